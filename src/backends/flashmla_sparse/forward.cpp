// SPDX-License-Identifier: Apache-2.0
// The steps of a layer's call. Prefill and decode are the same thing here: queries with the weights
// of the keys multiplied in attend to the rows that their indices name.
#include <algorithm>
#include <cstdint>

#include "attend/dist/decode_context_parallel.h"
#include "attend/ops/mla_cache.h"
#include "attend/ops/sparse_index.h"
#include "backends/common/copy_rope.h"
#include "backends/common/for_rows.h"
#include "backends/common/layout_cursor.h"
#include "backends/common/quantise_output.h"
#include "backends/flashmla_sparse/layer.h"
#include "dist/dcp/gather_heads.h"
#include "dist/dcp/reserve.h"

namespace attend::flashmla_sparse {
namespace {

/// Tokens that are attended to at a time.
struct Tokens {
  std::int32_t begin, end;
  std::int32_t count() const { return end - begin; }
};

/// What only ranks of a group need; a thread reuses the memory.
struct GroupScratch {
  dcp::HeadBuffers queries;
  Buffer out, lse;
};
GroupScratch& thread_scratch() {
  thread_local GroupScratch scratch;
  return scratch;
}

class Call {
 public:
  Call(const Layer& layer, const ForwardArgs& args, const SparseMlaMetadata& m, Executor& executor)
      : layer_(layer),
        args_(args),
        m_(m),
        d_(layer.dims()),
        executor_(executor),
        base_(aligned_start(args.workspace.data)),
        output_(args.output.slice(0, 0, m.num_tokens)) {
    if (args.output_scale)
      output_ = view(m.layout.output, DType::bf16, {m.num_tokens, m.num_heads, d_.v_head_dim});
  }

  void run() {
    write_cache();
    for (const Step& step : m_.steps) {
      if (step.rows > 0) gather(step);
      for (std::int32_t t = step.token_begin; t < step.token_end; t += m_.tokens_at_once)
        attend(step, {t, std::min(step.token_end, t + m_.tokens_at_once)});
    }
    if (args_.output_scale)
      quantise_output(output_, *args_.output_scale, args_.output.slice(0, 0, m_.num_tokens),
                      executor_);
  }

 private:
  TensorView view(std::size_t offset, DType dtype,
                  std::initializer_list<std::int64_t> shape) const {
    return {base_ + offset, dtype, shape};
  }

  void write_cache() const {
    if (!args_.kv_c.defined() || m_.slot_mapping.empty()) return;
    ConcatAndCacheMlaArgs a;
    a.kv_c = args_.kv_c;
    a.k_pe = args_.k_pe;
    a.kv_cache = args_.kv_cache;
    a.slot_mapping = {m_.slot_mapping.data(), DType::i64, {m_.num_tokens}};
    concat_and_cache_mla(a, &executor_);
  }

  TensorView workspace_rows(const Step& step) const {
    return view(m_.layout.rows, DType::bf16, {step.rows, d_.cache_dim()});
  }

  void gather(const Step& step) {
    const ConstTensorView table = m_.block_table.slice(0, step.request_begin, step.num_requests());
    const auto* starts = step.workspace_starts.data();
    if (m_.stored.format == KvFormat::fp8_ds_mla) {
      cp_gather_and_upconvert_fp8_kv_cache(
          {.src_cache = args_.kv_cache,
           .dst = workspace_rows(step),
           .block_table = table,
           .workspace_starts = {starts, DType::i32, {step.num_requests()}}},
          &executor_);
      return;
    }
    cp_gather_cache({.src_cache = args_.kv_cache,
                     .dst = workspace_rows(step),
                     .block_table = table,
                     .cu_seq_lens = {starts, DType::i32, {step.num_requests() + 1}}},
                    &executor_);
  }

  /// The indices of the tokens as rows of what they read. Returns how many of each count, if those
  /// are at the front; undefined = all may.
  ConstTensorView find_rows(const Step& step, Tokens tokens, const TensorView& slots) const {
    hide_later_tokens(tokens, slots);
    const std::int32_t n = tokens.count();
    const auto of_tokens = [&](const std::vector<std::int32_t>& all) {
      return ConstTensorView(all.data() + tokens.begin, DType::i32, {n});
    };
    const SparseIndexPages pages{m_.block_table, args_.kv_cache.shape[0], m_.block_size, 0};
    if (m_.dcp.world_size > 1) {
      const TensorView counts = view(m_.layout.counts, DType::i32, {n});
      filter_and_convert_dcp_index({.req_id = of_tokens(m_.buffers->request_of_token),
                                    .pages = pages,
                                    .token_indices = slots,
                                    .out = slots,
                                    .valid_counts = counts,
                                    .world_size = m_.dcp.world_size,
                                    .interleave = m_.dcp.interleave,
                                    .rank = m_.dcp.rank,
                                    .compact_to_front = true},
                                   &executor_);
      return counts;
    }
    ConvertReqIndexToGlobalIndexArgs a;
    a.req_id = of_tokens(m_.buffers->request_of_token);
    a.pages = pages;
    a.token_indices = slots;
    a.out = slots;
    if (step.gathered) {
      a.prefill_workspace_request_ids = of_tokens(m_.buffers->workspace_request);
      a.prefill_workspace_starts = {
          step.workspace_starts.data(), DType::i32, {step.num_requests()}};
      a.workspace_rows = step.rows;
    }
    convert_req_index_to_global_index(a, &executor_);
    return {};
  }

  /// Copies the indices. In the workspace a row behind a request's last one is another request's,
  /// and in the cache it may hold anything: no token sees what comes after it.
  void hide_later_tokens(Tokens tokens, const TensorView& slots) const {
    const ConstTensorView& from = args_.topk_indices;
    for_rows(tokens.count(), std::int64_t{m_.topk} * 4, executor_,
             [&](std::int64_t begin, std::int64_t end) {
               for (std::int64_t t = begin; t < end; ++t) {
                 const std::int64_t token = tokens.begin + t;
                 const std::int32_t visible =
                     m_.buffers->visible_of_token[static_cast<std::size_t>(token)];
                 const auto* chosen = from.as<std::int32_t>() + token * from.strides[0];
                 std::transform(chosen, chosen + m_.topk, slots.as<std::int32_t>() + t * m_.topk,
                                [&](std::int32_t i) { return i < visible ? i : -1; });
               }
             });
  }

  TensorView absorb_queries(Tokens tokens) const {
    const std::int32_t n = tokens.count();
    const ConstTensorView query = args_.query.slice(0, tokens.begin, n);
    const TensorView queries =
        view(m_.layout.queries, DType::bf16, {n, m_.num_heads, d_.cache_dim()});
    layer_.weights().absorb_query(query.slice(2, 0, d_.qk_nope_head_dim),
                                  queries.slice(2, 0, d_.kv_lora_rank), &executor_);
    copy_rope(query.slice(2, d_.qk_nope_head_dim, d_.qk_rope_head_dim),
              queries.slice(2, d_.kv_lora_rank, d_.qk_rope_head_dim), executor_);
    return queries;
  }

  void attend(const Step& step, Tokens tokens) const {
    const std::int32_t n = tokens.count();
    const TensorView slots = view(m_.layout.slots, DType::i32, {n, m_.topk});
    const TensorView latents =
        view(m_.layout.latents, DType::bf16, {n, m_.num_heads, d_.kv_lora_rank});
    SparseMlaArgs a;
    a.topk_length = find_rows(step, tokens, slots);
    a.indices = slots;
    a.q = absorb_queries(tokens);
    a.kv_cache = step.gathered && step.rows > 0
                     ? ConstTensorView(workspace_rows(step).data, DType::bf16,
                                       {1, step.rows, d_.cache_dim()})
                     : ConstTensorView(args_.kv_cache);
    a.out = latents;
    if (args_.lse.defined()) a.lse = args_.lse.slice(0, tokens.begin, n);
    a.scale = layer_.scale;
    if (m_.dcp.world_size > 1) {
      attend_in_group(a);
    } else {
      sparse_mla_attention(a, plan_of(n), plan_workspace(), executor_);
    }
    layer_.weights().v_up_project(latents, output_.slice(0, tokens.begin, n), &executor_);
  }

  const SparseMlaPlan& plan_of(std::int32_t n) const { return m_.plans.find(n)->second; }
  Workspace plan_workspace() const {
    return {base_ + m_.layout.plan, m_.layout.total - LayoutCursor::kAlignment - m_.layout.plan};
  }

  /// All heads of the group attend to this rank's rows; the parts become the result by their LSE. A
  /// row whose tokens all lie elsewhere has part 0 and LSE -infinity.
  void attend_in_group(SparseMlaArgs a) const {
    GroupScratch& scratch = thread_scratch();
    const std::int64_t n = a.q.shape[0], all_heads = std::int64_t{m_.num_heads} * m_.dcp.world_size;
    DcpCombineArgs c;
    c.combined = a.out;
    c.combined_lse = a.lse;
    a.q = dcp::gather_heads(a.q, *args_.communicator, scratch.queries);
    a.out = dcp::reserve(scratch.out, DType::bf16, {n, all_heads, d_.kv_lora_rank});
    a.lse = dcp::reserve(scratch.lse, DType::f32, {n, all_heads});
    sparse_mla_attention(a, plan_of(static_cast<std::int32_t>(n)), plan_workspace(), executor_);
    c.out = a.out;
    c.lse = a.lse;
    cp_lse_ag_out_rs(c, *args_.communicator);
  }

  const Layer& layer_;
  const ForwardArgs& args_;
  const SparseMlaMetadata& m_;
  const MlaDims& d_;
  Executor& executor_;
  std::byte* base_;
  TensorView output_;  ///< [T, H, V] in bf16
};

}  // namespace

void run_forward(const Layer& layer, const ForwardArgs& args, const SparseMlaMetadata& m,
                 Executor& executor) {
  Call(layer, args, m, executor).run();
}

}  // namespace attend::flashmla_sparse
