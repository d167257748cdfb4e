// SPDX-License-Identifier: Apache-2.0
#include "backend/mla_prefill_call.h"

#include <cstring>
#include <numeric>

namespace attend::testing {
namespace {

constexpr int kGap = 8;  ///< columns behind each output row
constexpr int kSpareKeys = 3;

std::int64_t sum(const std::vector<std::int32_t>& lens) {
  return std::accumulate(lens.begin(), lens.end(), std::int64_t{0});
}

HostTensor starts(const std::vector<std::int32_t>& lens) {
  HostTensor t(DType::i32, {static_cast<std::int64_t>(lens.size()) + 1});
  std::partial_sum(lens.begin(), lens.end(), t.as<std::int32_t>().begin() + 1);
  return t;
}

MlaPrefillImplConfig impl_config(const PrefillOptions& o) {
  MlaPrefillImplConfig config;
  config.num_heads = o.num_heads;
  config.scale = o.scale;
  config.dims = o.dims;
  config.dtype = o.dtype;
  config.platform = Platform::parse(o.platform);
  return config;
}

}  // namespace

PrefillCall::PrefillCall(const PrefillOptions& o)
    : options(o),
      executor(make_thread_pool(o.num_workers)),
      impl(find_mla_prefill_backend(o.backend).make_impl(impl_config(o))),
      q(o.dtype, {sum(o.query_lens), o.num_heads, o.dims.qk_head_dim()}),
      k(o.dtype, {sum(o.key_lens) + kSpareKeys, o.num_heads, o.dims.qk_head_dim()}),
      v(o.dtype, {sum(o.key_lens) + kSpareKeys, o.num_heads, o.dims.v_head_dim}),
      wide_out(o.quant_output ? DType::fp8_e4m3 : o.dtype,
               {sum(o.query_lens), o.num_heads, o.dims.v_head_dim + kGap}),
      lse(DType::f32, {sum(o.query_lens), o.num_heads}),
      query_start_loc(starts(o.query_lens)),
      cu_seqlens_kv(starts(o.key_lens)),
      out(wide_out.view().slice(2, 0, o.dims.v_head_dim)) {
  Rng rng(11);
  q.fill_normal(rng);
  k.fill_bytes(0xFF);
  v.fill_bytes(0xFF);
  const auto fill_keys = [&](const HostTensor& t) {
    const TensorView used = t.view().slice(0, 0, sum(o.key_lens));
    HostTensor values(o.dtype, std::span(used.shape).first(3));
    values.fill_normal(rng);
    if (values.bytes() > 0) std::memcpy(used.data, values.view().data, values.bytes());
  };
  fill_keys(k);
  fill_keys(v);
  wide_out.fill_bytes(0xFF);
  lse.fill_bytes(0xFF);

  AttentionPlanInput in;
  in.query_start_loc = query_start_loc.as<std::int32_t>();
  in.seq_lens = options.key_lens;
  in.num_q_heads = in.num_kv_heads = o.num_heads;
  in.head_dim_qk = o.dims.qk_head_dim();
  in.head_dim_v = impl->head_dim_v();
  in.causal = o.causal;
  in.num_workers = o.num_workers;
  plan = plan_attention(in);
  workspace = Buffer(plan.workspace_bytes +
                     impl->workspace_bytes(sum(o.query_lens), sum(o.key_lens), o.quant_output));
  std::memset(workspace.data(), 0xFF, workspace.size());
}

NewTokensArgs PrefillCall::new_tokens() const {
  NewTokensArgs a;
  a.q = q;
  a.k = k;
  a.v = v;
  a.out = out;
  if (options.quant_output) {
    a.output_scale = 0.01F;
  } else {
    a.lse = lse;
  }
  a.plan = &plan;
  a.workspace = workspace.workspace();
  a.executor = executor.get();
  return a;
}

ContextChunkArgs PrefillCall::context_chunk() const {
  ContextChunkArgs a;
  a.q = q;
  a.k = k;
  a.v = v;
  a.out = out;
  a.lse = lse;
  a.plan = &plan;
  a.workspace = workspace.workspace();
  a.executor = executor.get();
  return a;
}

void PrefillCall::run() const {
  if (options.causal) {
    impl->run_prefill_new_tokens(new_tokens());
  } else {
    impl->run_prefill_context_chunk(context_chunk());
  }
}

FlashAttnVarlenArgs PrefillCall::op_args() const {
  FlashAttnVarlenArgs a;
  a.q = q;
  a.k = k;
  a.v = v;
  a.out = out;
  a.lse = lse;
  a.query_start_loc = query_start_loc;
  a.cu_seqlens_kv = cu_seqlens_kv;
  a.params.causal = options.causal;
  a.params.scale = options.scale;
  return a;
}

bool PrefillCall::gaps_are_untouched() const {
  const TensorView gap = wide_out.view().slice(2, options.dims.v_head_dim, kGap);
  const std::vector<unsigned char> untouched(kGap * size_of(gap.dtype), 0xFF);
  for (std::int64_t t = 0; t < gap.shape[0]; ++t) {
    for (std::int64_t h = 0; h < gap.shape[1]; ++h) {
      const void* columns = gap.select(0, t).select(0, h).data;
      if (std::memcmp(columns, untouched.data(), untouched.size()) != 0) return false;
    }
  }
  return true;
}

}  // namespace attend::testing
