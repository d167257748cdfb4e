// SPDX-License-Identifier: Apache-2.0
// The steps of a layer's call. Everything that attends reads its keys from the cache, those of this
// step's tokens too: so a row does not depend on how many of its keys came with it.
#include <cstdint>

#include "attend/ops/mla.h"
#include "attend/ops/mla_cache.h"
#include "backends/common/copy_rope.h"
#include "backends/common/layout_cursor.h"
#include "backends/common/quantise_output.h"
#include "backends/mla/layer.h"

namespace attend::mla {
namespace {

class Call {
 public:
  Call(const Layer& layer, const ForwardArgs& args, const MlaMetadata& m, Executor& executor)
      : layer_(layer),
        args_(args),
        m_(m),
        d_(layer.dims()),
        executor_(executor),
        base_(aligned_start(args.workspace.data)) {
    output_ = args.output.slice(0, 0, m.num_tokens);
    if (args.output_scale && !is_fused())
      output_ =
          view(m.layout.output, layer.config.dtype, {m.num_tokens, m.num_heads, d_.v_head_dim});
  }

  void run() {
    write_cache();
    if (m_.split.num_decode_tokens > 0) decode();
    for (const PrefillStep& step : m_.prefill_steps) prefill(step);
    if (args_.output_scale && !is_fused())
      quantise_output(output_, *args_.output_scale, args_.output.slice(0, 0, m_.num_tokens),
                      executor_);
  }

 private:
  /// Whether the prefill back end writes codes itself: it does so for new tokens without context.
  bool is_fused() const {
    return args_.output_scale && m_.split.num_decode_tokens == 0 && m_.carried_tokens == 0 &&
           !args_.lse.defined();
  }

  TensorView view(std::size_t offset, DType dtype,
                  std::initializer_list<std::int64_t> shape) const {
    return {base_ + offset, dtype, shape};
  }
  Workspace rest(std::size_t offset) const { return {base_ + offset, m_.layout.total - offset}; }
  ConstTensorView kv_scale() const {
    if (!is_fp8(layer_.stored.dtype)) return {};
    return {&layer_.kv_scale, DType::f32, {1}};
  }

  void write_cache() const {
    if (!args_.kv_c.defined() || m_.slot_mapping.empty()) return;
    ConcatAndCacheMlaArgs a;
    a.kv_c = args_.kv_c;
    a.k_pe = args_.k_pe;
    a.kv_cache = args_.kv_cache;
    a.slot_mapping = {m_.slot_mapping.data(), DType::i64, {m_.num_tokens}};
    a.scale = kv_scale();
    concat_and_cache_mla(a, &executor_);
  }

  /// Every decode token attends to the latents themselves.
  void decode() const {
    const int tokens = m_.split.num_decode_tokens;
    const DType dtype = layer_.config.dtype;
    const ConstTensorView query = args_.query.slice(0, 0, tokens);
    const TensorView queries =
        view(m_.layout.queries, dtype, {tokens, m_.num_heads, d_.cache_dim()});
    const TensorView latents =
        view(m_.layout.latents, dtype, {tokens, m_.num_heads, d_.kv_lora_rank});
    layer_.weights().absorb_query(query.slice(2, 0, d_.qk_nope_head_dim),
                                  queries.slice(2, 0, d_.kv_lora_rank), &executor_);
    copy_rope(query.slice(2, d_.qk_nope_head_dim, d_.qk_rope_head_dim),
              queries.slice(2, d_.kv_lora_rank, d_.qk_rope_head_dim), executor_);
    MlaDecodeArgs a;
    a.q = queries;
    a.kv_cache = args_.kv_cache;
    a.block_table = m_.block_table.slice(0, 0, m_.split.num_decodes);
    a.out = latents;
    if (args_.lse.defined()) a.lse = args_.lse.slice(0, 0, tokens);
    a.kv_scale = kv_scale();
    a.params.scale = layer_.scale;
    a.params.causal = true;
    mla_decode(a, m_.decode, rest(m_.layout.decode), executor_);
    layer_.weights().v_up_project(latents, output_.slice(0, 0, tokens), &executor_);
  }

  /// Makes keys and values of all heads of the step's latents and attends to them.
  void prefill(const PrefillStep& step) const {
    const DType dtype = layer_.config.dtype;
    const TensorView rows = view(m_.layout.rows, dtype, {step.num_keys(), d_.cache_dim()});
    const TensorView keys =
        view(m_.layout.keys, dtype, {step.num_keys(), m_.num_heads, d_.qk_head_dim()});
    const TensorView values =
        view(m_.layout.values, dtype, {step.num_keys(), m_.num_heads, d_.v_head_dim});
    gather(step, rows);
    layer_.weights().up_project(rows.slice(1, 0, d_.kv_lora_rank),
                                keys.slice(2, 0, d_.qk_nope_head_dim), values, &executor_);
    const ConstTensorView rope(rows.slice(1, d_.kv_lora_rank, d_.qk_rope_head_dim).data, dtype,
                               {step.num_keys(), 1, d_.qk_rope_head_dim});
    copy_rope(with_row_stride(rope, rows.strides[0]),
              keys.slice(2, d_.qk_nope_head_dim, d_.qk_rope_head_dim), executor_);
    if (step.last) {
      finish(step, keys, values);
    } else {
      add_chunk(step, keys, values);
    }
  }

  static ConstTensorView with_row_stride(ConstTensorView t, std::int64_t stride) {
    t.strides[0] = stride;
    return t;
  }

  void gather(const PrefillStep& step, const TensorView& rows) const {
    const std::int64_t num_reqs = step.request_end - step.request_begin;
    GatherAndMaybeDequantCacheArgs a;
    a.src_cache = args_.kv_cache;
    a.dst = rows;
    a.block_table = m_.block_table.slice(0, step.request_begin, num_reqs);
    a.cu_seq_lens = {step.cu_seq_lens.data(), DType::i32, {num_reqs + 1}};
    a.seq_starts = {step.starts.data(), DType::i32, {num_reqs}};
    a.scale = kv_scale();
    gather_and_maybe_dequant_cache(a, &executor_);
  }

  /// The step's rows of a tensor of all tokens.
  template <typename View>
  View tokens_of(const View& t, const PrefillStep& step) const {
    return t.slice(0, step.token_begin, step.plan.num_tokens());
  }

  AttentionCarry carry(const PrefillStep& step) const {
    AttentionCarry c;
    if (m_.carried_tokens == 0) return c;
    const std::int64_t first = step.token_begin - m_.split.num_decode_tokens;
    // The rows of a last step may all lie behind those that have a state.
    const TensorView all =
        view(m_.layout.state, DType::f32,
             {m_.carried_tokens, m_.num_heads, std::int64_t{layer_.prefill->head_dim_v()} + 2});
    if (first >= m_.carried_tokens) return c;
    c.state = all.slice(0, first, m_.carried_tokens - first);
    c.resumes = {step.resumes.data(), DType::u8, {static_cast<std::int64_t>(step.resumes.size())}};
    c.last = step.last;
    return c;
  }

  void add_chunk(const PrefillStep& step, const TensorView& keys, const TensorView& values) const {
    ContextChunkArgs a;
    a.q = tokens_of(args_.query, step);
    a.k = keys;
    a.v = values;
    a.carry = carry(step);
    a.plan = &step.plan;
    a.workspace = rest(m_.layout.prefill);
    a.executor = &executor_;
    layer_.prefill->run_prefill_context_chunk(a);
  }

  void finish(const PrefillStep& step, const TensorView& keys, const TensorView& values) const {
    NewTokensArgs a;
    a.q = tokens_of(args_.query, step);
    a.k = keys;
    a.v = values;
    a.out = is_fused() ? tokens_of(args_.output, step) : tokens_of(output_, step);
    if (is_fused()) a.output_scale = args_.output_scale;
    if (args_.lse.defined()) a.lse = tokens_of(args_.lse, step);
    a.carry = carry(step);
    a.plan = &step.plan;
    a.workspace = rest(m_.layout.prefill);
    a.executor = &executor_;
    layer_.prefill->run_prefill_new_tokens(a);
  }

  const Layer& layer_;
  const ForwardArgs& args_;
  const MlaMetadata& m_;
  const MlaDims& d_;
  Executor& executor_;
  std::byte* base_;
  TensorView output_;  ///< [T, H, V] in the dtype of the layer
};

}  // namespace

void run_forward(const Layer& layer, const ForwardArgs& args, const MlaMetadata& m,
                 Executor& executor) {
  Call(layer, args, m, executor).run();
}

}  // namespace attend::mla
