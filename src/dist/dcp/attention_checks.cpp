// SPDX-License-Identifier: Apache-2.0
#include "dist/dcp/attention_checks.h"

#include <utility>

#include "core/check.h"
#include "dist/dcp/layout.h"
#include "ops/attention_problem.h"

namespace attend::dcp {
namespace {

void check_head_size(check::Where where, std::int64_t size) {
  check::require(size > 0 && size % 8 == 0 && size <= 256, where,
                 "a head size (last dimension) that is a multiple of 8 in [8, 256]", size);
}

void check_float_tensor(check::Where where, const ConstTensorView& t, int rank, DType dtype,
                        std::initializer_list<std::int64_t> shape) {
  check::tensor(where, t, rank, {dtype});
  check::shape(where, t, shape);
  check::unit_last_stride(where, t);
}

/// A cache of a branch; all of it if there is one.
ConstTensorView first_branch(const AttentionCall& call, const ConstTensorView& cache) {
  return call.branches == 1 ? cache : cache.select(0, 0);
}

void check_cache(const AttentionCall& call, std::string_view name, const ConstTensorView& cache) {
  const bool branches = call.branches > 1;
  check::tensor({call.op, name}, cache, branches ? 5 : 4, {call.args.q.dtype});
  if (branches) check::shape({call.op, name}, cache, {call.branches, -1, -1, -1, -1});
}

void check_heads(const AttentionCall& call, const AttentionSizes& s) {
  check::require(s.kv_heads > 0, {call.op, "k_cache"}, "at least 1 head",
                 [&] { return describe(call.args.k_cache); });
  const std::int64_t step = s.kv_heads / s.branches * s.maps;
  check::require(
      s.heads > 0 && s.heads <= kMaxHeads && s.heads % s.maps == 0 && s.all_heads() % step == 0,
      {call.op, "q"},
      [&] {
        return fmt::format(
            "at most {} heads{} that on {} ranks together are a positive multiple of {}", kMaxHeads,
            s.maps == 1 ? "" : ", whole pairs,", s.ranks, step);
      },
      s.heads);
}

/// A written tensor: no element twice, nothing in common with an input.
void check_apart(const AttentionCall& call, std::string_view name, const ConstTensorView& written) {
  const DcpAttentionArgs& a = call.args;
  check::distinct_elements({call.op, name}, written);
  for (const auto& [other, input] : {std::pair{"q", a.q},
                                     {"k_cache", a.k_cache},
                                     {"v_cache", a.v_cache},
                                     {"k_new", a.k_new},
                                     {"v_new", a.v_new},
                                     {"query_start_loc", a.query_start_loc},
                                     {"seq_lens", a.seq_lens},
                                     {"block_table", a.block_table}}) {
    check::no_overlap({call.op, name}, written, other, input);
  }
}

void check_results(const AttentionCall& call, const AttentionSizes& s) {
  const DcpAttentionArgs& a = call.args;
  check_float_tensor({call.op, "out"}, a.out, 3, a.q.dtype,
                     {s.tokens, s.heads / s.maps * s.branches, s.dim_v});
  check_apart(call, "out", a.out);
  if (!a.lse.defined()) return;
  const check::Where where{call.op, "lse"};
  check::tensor(where, a.lse, 2, {DType::f32});
  check::shape(where, a.lse, {s.tokens, s.heads});
  check_apart(call, "lse", a.lse);
  check::no_overlap(where, a.lse, "out", a.out);
}

/// Lengths of the requests' contexts: the tokens before this step's, on all ranks together.
std::vector<std::int32_t> context_lengths(std::string_view op, std::span<const std::int32_t> starts,
                                          std::span<const std::int32_t> seq_lens) {
  std::vector<std::int32_t> context;
  for (std::size_t r = 0; r < seq_lens.size(); ++r) {
    const std::int64_t query = std::int64_t{starts[r + 1]} - starts[r];
    check::require(
        query >= 0, {op, "query_start_loc"},
        [&] { return fmt::format("at least {} at index {}", starts[r], r + 1); }, starts[r + 1]);
    check::require(
        seq_lens[r] >= query, {op, "seq_lens"},
        [&] { return fmt::format("at least {}, the new tokens, at index {}", query, r); },
        seq_lens[r]);
    context.push_back(static_cast<std::int32_t>(seq_lens[r] - query));
  }
  return context;
}

void check_table_width(const AttentionCall& call, const AttentionSizes& s,
                       std::span<const std::int32_t> context) {
  const DcpAttentionArgs& a = call.args;
  const check::Where where{call.op, "block_table"};
  check::tensor(where, a.block_table, 2, {DType::i32});
  check::shape(where, a.block_table, {static_cast<std::int64_t>(context.size()), -1});
  // Divided, not multiplied: the width is not trusted.
  const std::int64_t covered = first_branch(call, a.k_cache).shape[1] * s.ranks;
  for (std::size_t r = 0; r < context.size(); ++r) {
    check::require((context[r] + covered - 1) / covered <= a.block_table.shape[1], where,
                   [&] {
                     return fmt::format(
                         "at least {} columns of {} tokens for the context of request {}",
                         (context[r] + covered - 1) / covered, covered, r);
                   },
                   a.block_table.shape[1]);
  }
}

/// One run if whole groups, or a part of one group, belong to this rank; otherwise one for each kv
/// head. Counted in what stays together: pairs, if there are any.
std::vector<HeadRun> head_runs(const AttentionSizes& s) {
  const std::int64_t heads = s.heads / s.maps;
  const std::int64_t group = heads * s.ranks / (s.kv_heads / s.branches);
  const std::int64_t first = s.rank * heads;
  std::vector<HeadRun> runs;
  if (heads % group == 0) {
    runs = {{0, heads, first / group, heads / group}};
  } else {
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t kv_head = (first + h) / group;
      if (runs.empty() || runs.back().kv_begin != kv_head) runs.push_back({h, 0, kv_head, 1});
      ++runs.back().q_count;
    }
  }
  for (HeadRun& run : runs)
    run = {run.q_begin * s.maps, run.q_count * s.maps, run.kv_begin * s.branches,
           run.kv_count * s.branches};
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

AttentionSizes check_attention(const AttentionCall& call, const Communicator& comm) {
  const DcpAttentionArgs& a = call.args;
  const auto at = [&](std::string_view name) { return check::Where{call.op, name}; };
  check::tensor(at("q"), a.q, 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride(at("q"), a.q);
  check_cache(call, "k_cache", a.k_cache);
  check_cache(call, "v_cache", a.v_cache);
  const ConstTensorView k_cache = first_branch(call, a.k_cache);
  const ConstTensorView v_cache = first_branch(call, a.v_cache);
  const AttentionSizes s{
      comm.size(),  comm.rank(),      a.q.shape[0], a.q.shape[1], k_cache.shape[2] * call.branches,
      a.q.shape[2], v_cache.shape[3], call.maps,    call.branches};
  check_head_size(at("q"), s.dim);
  check_head_size(at("v_cache"), s.dim_v);
  check_heads(call, s);
  const std::int64_t cache_heads = k_cache.shape[2];
  check_float_tensor(at("k_cache"), k_cache, 4, a.q.dtype, {-1, -1, cache_heads, s.dim});
  check_float_tensor(at("v_cache"), v_cache, 4, a.q.dtype,
                     {k_cache.shape[0], k_cache.shape[1], cache_heads, -1});
  check_float_tensor(at("k_new"), a.k_new, 3, a.q.dtype, {s.tokens, s.kv_heads, s.dim});
  check_float_tensor(at("v_new"), a.v_new, 3, a.q.dtype, {s.tokens, s.kv_heads, s.dim_v});
  ops::check_block_size(call.op, "k_cache", k_cache);
  check_layout(call.op, {s.ranks, a.interleave});
  check::require(
      k_cache.shape[1] % a.interleave == 0, at("interleave"),
      [&] { return fmt::format("a divisor of the block size, {}", k_cache.shape[1]); },
      a.interleave);
  check_supported(call.op, a.params);
  ops::check_params(call.op, a.params, 0, s.heads);
  check_results(call, s);
  return s;
}

AttentionPlans plan_attention_steps(const AttentionCall& call, const AttentionSizes& s,
                                    int num_workers, const KernelOptions& kernels) {
  const DcpAttentionArgs& a = call.args;
  const ConstTensorView k_cache = first_branch(call, a.k_cache);
  AttentionPlanInput in;
  in.op = call.op;
  in.query_start_loc = check::i32_array({call.op, "query_start_loc"}, a.query_start_loc, -1);
  const auto requests = static_cast<std::int64_t>(in.query_start_loc.size()) - 1;
  check::require(
      requests >= 0 && in.query_start_loc.back() == s.tokens, {call.op, "query_start_loc"},
      [&] { return fmt::format("{} at the end, the tokens of q", s.tokens); },
      [&] { return describe(a.query_start_loc); });
  const auto seq_lens = check::i32_array({call.op, "seq_lens"}, a.seq_lens, requests);
  std::vector<std::int32_t> context = context_lengths(call.op, in.query_start_loc, seq_lens);
  check_table_width(call, s, context);
  std::vector<std::int32_t> query_lens;
  for (std::size_t r = 0; r < context.size(); ++r) query_lens.push_back(seq_lens[r] - context[r]);
  dcp_local_seq_lens(context, s.rank, {s.ranks, a.interleave}, context);

  in.head_dim_qk = static_cast<int>(s.dim);
  in.head_dim_v = static_cast<int>(s.dim_v) * s.branches;
  in.branches = s.branches;
  in.num_workers = num_workers;
  in.isa = kernels.isa;
  in.arithmetic = kernels.arithmetic;
  in.causal = false;
  in.seq_lens = context;
  in.num_q_heads = static_cast<int>(s.all_heads());
  in.num_kv_heads = static_cast<int>(s.kv_heads) / s.branches;
  AttentionPlans plans;
  plans.context = plan_attention(in);
  ops::check_arithmetic(call.op, plans.context, a.q.dtype, a.k_cache.dtype, a.v_cache.dtype);
  ops::check_block_table(call.op, a.block_table, plans.context, static_cast<int>(k_cache.shape[1]),
                         k_cache.shape[0]);
  plans.runs = head_runs(s);
  in.causal = a.params.causal;
  in.request_causal = a.request_causal;
  in.seq_lens = query_lens;
  for (const HeadRun& run : plans.runs) {
    in.num_q_heads = static_cast<int>(run.q_count);
    in.num_kv_heads = static_cast<int>(run.kv_count) / s.branches;
    plans.new_keys.push_back(plan_attention(in));
  }
  return plans;
}

}  // namespace attend::dcp
