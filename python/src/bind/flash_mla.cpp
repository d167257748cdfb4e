// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/flash_mla.h"

#include "arguments.h"

namespace attend::python {
namespace {

FlashMlaWithKvCacheArgs read_with_kvcache(Arguments& call) {
  FlashMlaWithKvCacheArgs a;
  a.q = call.in("q");
  a.k_cache = call.in("k_cache");
  a.block_table = call.in("block_table");
  a.cache_seqlens = call.in("cache_seqlens");
  a.head_dim_v = call.small_integer("head_dim_v", 512);
  a.tile_scheduler_metadata = call.in("tile_scheduler_metadata");
  a.num_splits = call.in("num_splits");
  a.softmax_scale = call.optional_number("softmax_scale");
  a.causal = call.boolean("causal", false);
  a.is_fp8_kvcache = call.boolean("is_fp8_kvcache", false);
  a.indices = call.in("indices");
  a.topk_length = call.in("topk_length");
  a.attn_sink = call.in("attn_sink");
  a.extra_k_cache = call.in("extra_k_cache");
  a.extra_indices = call.in("extra_indices");
  a.extra_topk_length = call.in("extra_topk_length");
  a.out = call.out("out");
  a.lse = call.out("lse");
  return a;
}

FlashMlaSparseFwdArgs read_sparse_fwd(Arguments& call) {
  FlashMlaSparseFwdArgs a;
  a.q = call.in("q");
  a.kv = call.in("kv");
  a.indices = call.in("indices");
  a.sm_scale = static_cast<float>(call.number("sm_scale", 0.0));
  a.d_v = call.small_integer("d_v", 512);
  a.attn_sink = call.in("attn_sink");
  a.topk_length = call.in("topk_length");
  a.out = call.out("out");
  a.max_logits = call.out("max_logits");
  a.lse = call.out("lse");
  return a;
}

int num_sm_parts(const nb::kwargs& values) {
  Arguments call("mla_num_sm_parts", values);
  int counts[4];
  constexpr const char* kNames[4] = {"num_processors", "num_heads_q", "num_heads_k",
                                     "num_q_tokens"};
  for (int i = 0; i < 4; ++i) {
    counts[i] = call.small_integer(kNames[i], 0);
    if (counts[i] < 1) call.refuse(kNames[i], "a number >= 1", std::to_string(counts[i]));
  }
  if (counts[1] % counts[2] != 0)
    call.refuse("num_heads_k", "a divisor of num_heads_q = " + std::to_string(counts[1]),
                std::to_string(counts[2]));
  call.done();
  return mla_num_sm_parts(counts[0], counts[1], counts[2], counts[3]);
}

}  // namespace

void bind_flash_mla(nb::module_& m) {
  m.def("mla_num_sm_parts", &num_sm_parts);
  m.def("get_mla_metadata", [](const nb::kwargs& values) {
    Arguments call("get_mla_metadata", values);
    GetMlaMetadataArgs a;
    a.cache_seqlens = call.in("cache_seqlens");
    a.tile_scheduler_metadata = call.out("tile_scheduler_metadata");
    a.num_splits = call.out("num_splits");
    call.run_here([&] { get_mla_metadata(a); });
  });
  m.def("flash_mla_with_kvcache", [](const nb::kwargs& values) {
    Arguments call("flash_mla_with_kvcache", values);
    const FlashMlaWithKvCacheArgs a = read_with_kvcache(call);
    const KernelOptions kernels = call.kernels();
    call.run([&](Executor& e) { flash_mla_with_kvcache(a, &e, kernels); });
  });
  m.def("flash_mla_sparse_fwd", [](const nb::kwargs& values) {
    Arguments call("flash_mla_sparse_fwd", values);
    const FlashMlaSparseFwdArgs a = read_sparse_fwd(call);
    const KernelOptions kernels = call.kernels();
    call.run([&](Executor& e) { flash_mla_sparse_fwd(a, &e, kernels); });
  });
}

}  // namespace attend::python
