// SPDX-License-Identifier: Apache-2.0
#include "dist/dcp/attention_checks.h"

#include <utility>

#include "core/check.h"
#include "dist/dcp/layout.h"
#include "ops/attention_problem.h"

namespace attend::dcp {
namespace {

constexpr std::string_view kOp = kAttentionOp;

void check_head_size(std::string_view name, std::int64_t size) {
  check::require(size > 0 && size % 8 == 0 && size <= 256, {kOp, name},
                 "a head size (last dimension) that is a multiple of 8 in [8, 256]", size);
}

void check_float_tensor(std::string_view name, const ConstTensorView& t, int rank,
                        std::initializer_list<DType> dtypes,
                        std::initializer_list<std::int64_t> shape) {
  check::tensor({kOp, name}, t, rank, dtypes);
  check::shape({kOp, name}, t, shape);
  check::unit_last_stride({kOp, name}, t);
}

/// A written tensor: no element twice, nothing in common with an input.
void check_written(std::string_view name, const ConstTensorView& t, const DcpAttentionArgs& a) {
  check::distinct_elements({kOp, name}, t);
  for (const auto& [other, input] : {std::pair{"q", a.q},
                                     {"k_cache", a.k_cache},
                                     {"v_cache", a.v_cache},
                                     {"k_new", a.k_new},
                                     {"v_new", a.v_new},
                                     {"query_start_loc", a.query_start_loc},
                                     {"seq_lens", a.seq_lens},
                                     {"block_table", a.block_table}}) {
    check::no_overlap({kOp, name}, t, other, input);
  }
}

/// Lengths of the requests' contexts: the tokens before this step's, on all ranks together.
std::vector<std::int32_t> context_lengths(std::span<const std::int32_t> starts,
                                          std::span<const std::int32_t> seq_lens) {
  std::vector<std::int32_t> context;
  for (std::size_t r = 0; r < seq_lens.size(); ++r) {
    const std::int64_t query = std::int64_t{starts[r + 1]} - starts[r];
    check::require(
        query >= 0, {kOp, "query_start_loc"},
        [&] { return fmt::format("at least {} at index {}", starts[r], r + 1); }, starts[r + 1]);
    check::require(
        seq_lens[r] >= query, {kOp, "seq_lens"},
        [&] { return fmt::format("at least {}, the new tokens, at index {}", query, r); },
        seq_lens[r]);
    context.push_back(static_cast<std::int32_t>(seq_lens[r] - query));
  }
  return context;
}

void check_table_width(const DcpAttentionArgs& a, const AttentionSizes& s,
                       std::span<const std::int32_t> context) {
  check::tensor({kOp, "block_table"}, a.block_table, 2, {DType::i32});
  check::shape({kOp, "block_table"}, a.block_table,
               {static_cast<std::int64_t>(context.size()), -1});
  // Divided, not multiplied: the width is not trusted.
  const std::int64_t covered = a.k_cache.shape[1] * s.ranks;
  for (std::size_t r = 0; r < context.size(); ++r) {
    check::require(
        (context[r] + covered - 1) / covered <= a.block_table.shape[1], {kOp, "block_table"},
        [&] {
          return fmt::format("at least {} columns of {} tokens for the context of request {}",
                             (context[r] + covered - 1) / covered, covered, r);
        },
        a.block_table.shape[1]);
  }
}

/// One run if whole groups, or a part of one group, belong to this rank; otherwise one for each kv
/// head.
std::vector<HeadRun> head_runs(const AttentionSizes& s) {
  const std::int64_t group = s.all_heads() / s.kv_heads;
  const std::int64_t first = s.rank * s.heads;
  if (s.heads % group == 0) return {{0, s.heads, first / group, s.heads / group}};
  std::vector<HeadRun> runs;
  for (std::int64_t h = 0; h < s.heads; ++h) {
    const std::int64_t kv_head = (first + h) / group;
    if (runs.empty() || runs.back().kv_begin != kv_head) runs.push_back({h, 0, kv_head, 1});
    ++runs.back().q_count;
  }
  return runs;
}

}  // namespace

void check_supported(std::string_view op, const AttentionParams& params) {
  std::vector<std::string> reasons;
  if (params.window_left != -1 || params.window_right != -1) {
    reasons.push_back("a window needs positions that a rank's part of the context does not have");
  }
  if (params.alibi_slopes.defined()) {
    reasons.push_back("ALiBi needs positions that a rank's part of the context does not have");
  }
  if (params.sinks.defined()) {
    reasons.push_back("a sink enters once, after the parts have merged, and no step here adds it");
  }
  if (!reasons.empty()) throw Unsupported(op, std::move(reasons));
}

AttentionSizes check_attention(const DcpAttentionArgs& a, const Communicator& comm) {
  check::tensor({kOp, "q"}, a.q, 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride({kOp, "q"}, a.q);
  check::tensor({kOp, "k_cache"}, a.k_cache, 4, {a.q.dtype});
  check::tensor({kOp, "v_cache"}, a.v_cache, 4, {a.q.dtype});
  const AttentionSizes s{comm.size(),        comm.rank(),  a.q.shape[0],      a.q.shape[1],
                         a.k_cache.shape[2], a.q.shape[2], a.v_cache.shape[3]};
  check_head_size("q", s.dim);
  check_head_size("v_cache", s.dim_v);
  check::require(s.kv_heads > 0, {kOp, "k_cache"}, "at least 1 head",
                 [&] { return describe(a.k_cache); });
  check::require(
      s.heads > 0 && s.heads <= kMaxHeads && s.all_heads() % s.kv_heads == 0, {kOp, "q"},
      [&] {
        return fmt::format(
            "at most {} heads that on {} ranks together are a positive multiple of {}", kMaxHeads,
            s.ranks, s.kv_heads);
      },
      s.heads);
  check_float_tensor("k_cache", a.k_cache, 4, {a.q.dtype}, {-1, -1, s.kv_heads, s.dim});
  check_float_tensor("v_cache", a.v_cache, 4, {a.q.dtype},
                     {a.k_cache.shape[0], a.k_cache.shape[1], s.kv_heads, -1});
  check_float_tensor("k_new", a.k_new, 3, {a.q.dtype}, {s.tokens, s.kv_heads, s.dim});
  check_float_tensor("v_new", a.v_new, 3, {a.q.dtype}, {s.tokens, s.kv_heads, s.dim_v});
  check_float_tensor("out", a.out, 3, {a.q.dtype}, {s.tokens, s.heads, s.dim_v});
  ops::check_block_size(kOp, "k_cache", a.k_cache);
  check_layout(kOp, {s.ranks, a.interleave});
  check::require(
      a.k_cache.shape[1] % a.interleave == 0, {kOp, "interleave"},
      [&] { return fmt::format("a divisor of the block size, {}", a.k_cache.shape[1]); },
      a.interleave);
  check_supported(kOp, a.params);
  ops::check_params(kOp, a.params, 0, s.heads);
  check_written("out", a.out, a);
  if (a.lse.defined()) {
    check::tensor({kOp, "lse"}, a.lse, 2, {DType::f32});
    check::shape({kOp, "lse"}, a.lse, {s.tokens, s.heads});
    check_written("lse", a.lse, a);
    check::no_overlap({kOp, "lse"}, a.lse, "out", a.out);
  }
  return s;
}

AttentionPlans plan_attention_steps(const DcpAttentionArgs& a, const AttentionSizes& s,
                                    int num_workers, const KernelOptions& kernels) {
  AttentionPlanInput in;
  in.op = kOp.data();
  in.query_start_loc = check::i32_array({kOp, "query_start_loc"}, a.query_start_loc, -1);
  const auto requests = static_cast<std::int64_t>(in.query_start_loc.size()) - 1;
  check::require(
      requests >= 0 && in.query_start_loc.back() == s.tokens, {kOp, "query_start_loc"},
      [&] { return fmt::format("{} at the end, the tokens of q", s.tokens); },
      [&] { return describe(a.query_start_loc); });
  const auto seq_lens = check::i32_array({kOp, "seq_lens"}, a.seq_lens, requests);
  std::vector<std::int32_t> context = context_lengths(in.query_start_loc, seq_lens);
  check_table_width(a, s, context);
  std::vector<std::int32_t> query_lens;
  for (std::size_t r = 0; r < context.size(); ++r) query_lens.push_back(seq_lens[r] - context[r]);
  dcp_local_seq_lens(context, s.rank, {s.ranks, a.interleave}, context);

  in.head_dim_qk = static_cast<int>(s.dim);
  in.head_dim_v = static_cast<int>(s.dim_v);
  in.num_workers = num_workers;
  in.isa = kernels.isa;
  in.arithmetic = kernels.arithmetic;
  in.causal = false;
  in.seq_lens = context;
  in.num_q_heads = static_cast<int>(s.all_heads());
  in.num_kv_heads = static_cast<int>(s.kv_heads);
  AttentionPlans plans;
  plans.context = plan_attention(in);
  ops::check_arithmetic(kOp, plans.context, a.q.dtype, a.k_cache.dtype, a.v_cache.dtype);
  ops::check_block_table(kOp, a.block_table, plans.context, static_cast<int>(a.k_cache.shape[1]),
                         a.k_cache.shape[0]);
  plans.runs = head_runs(s);
  in.causal = a.params.causal;
  in.request_causal = a.request_causal;
  in.seq_lens = query_lens;
  for (const HeadRun& run : plans.runs) {
    in.num_q_heads = static_cast<int>(run.q_count);
    in.num_kv_heads = static_cast<int>(run.kv_count);
    plans.new_keys.push_back(plan_attention(in));
  }
  return plans;
}

}  // namespace attend::dcp
