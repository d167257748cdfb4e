// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/flash_mla.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attend/cache/row_format.h"
#include "attend/ops/mla.h"
#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/flash_mla_indices.h"
#include "ops/mla_rows.h"
#include "ops/mla_schedule.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "flash_mla_with_kvcache";
constexpr int kBlockSize = 64;

void check_tensors(const FlashMlaWithKvCacheArgs& a) {
  const RowFormat* format = nullptr;
  if (a.is_fp8_kvcache) {
    check::tensor({kOp, "q"}, a.q, 4, {DType::bf16});
    check::tensor({kOp, "k_cache"}, a.k_cache, 4, {DType::u8});
    check::shape({kOp, "k_cache"}, a.k_cache, {-1, kBlockSize, 1, -1});
    format = &mla_rows::require_row_format(kOp, "k_cache", a.k_cache.select(2, 0));
    check::shape({kOp, "q"}, a.q, {-1, -1, -1, row_dim(*format)});
  } else {
    check::tensor({kOp, "q"}, a.q, 4, {DType::f32, DType::f16, DType::bf16});
    check::tensor({kOp, "k_cache"}, a.k_cache, 4, {a.q.dtype});
    check::shape({kOp, "k_cache"}, a.k_cache, {-1, kBlockSize, 1, a.q.shape[3]});
  }
  check::require(a.q.shape[0] > 0 && a.q.shape[2] > 0, {kOp, "q"}, "at least 1 request and 1 head",
                 [&] { return describe(a.q); });
  const int dim = static_cast<int>(a.q.shape[3]);
  const int most = format != nullptr ? format->value_dim : std::min(dim, kMaxHeadDimV);
  check::require(
      a.head_dim_v > 0 && a.head_dim_v % 8 == 0 && a.head_dim_v <= most, {kOp, "head_dim_v"},
      [&] { return fmt::format("a multiple of 8 in [8, {}]", most); }, a.head_dim_v);
  if (a.softmax_scale)
    check::require(std::isfinite(*a.softmax_scale) && *a.softmax_scale > 0.0F,
                   {kOp, "softmax_scale"}, "a finite value > 0", *a.softmax_scale);
  check::tensor({kOp, "out"}, a.out, 4, {a.q.dtype});
  check::shape({kOp, "out"}, a.out, {a.q.shape[0], a.q.shape[1], a.q.shape[2], a.head_dim_v});
  check::tensor({kOp, "lse"}, a.lse, 3, {DType::f32});
  check::shape({kOp, "lse"}, a.lse, {a.q.shape[0], a.q.shape[2], a.q.shape[1]});
  for (const auto& [name, t] :
       {std::pair<const char*, ConstTensorView>{"q", a.q}, {"k_cache", a.k_cache}, {"out", a.out}})
    check::unit_last_stride({kOp, name}, t);
  for (const auto& [name, t] : {std::pair{"out", a.out}, {"lse", a.lse}}) {
    check::distinct_elements({kOp, name}, t);
    for (const auto& [other, input] : {std::pair<const char*, ConstTensorView>{"q", a.q},
                                       {"k_cache", a.k_cache},
                                       {"block_table", a.block_table},
                                       {"cache_seqlens", a.cache_seqlens},
                                       {"tile_scheduler_metadata", a.tile_scheduler_metadata},
                                       {"num_splits", a.num_splits},
                                       {"indices", a.indices},
                                       {"topk_length", a.topk_length},
                                       {"attn_sink", a.attn_sink},
                                       {"extra_k_cache", a.extra_k_cache},
                                       {"extra_indices", a.extra_indices},
                                       {"extra_topk_length", a.extra_topk_length}})
      if (input.defined()) check::no_overlap({kOp, name}, t, other, input);
  }
  check::no_overlap({kOp, "lse"}, a.lse, "out", a.out);
}

/// Lengths that the table has room for.
std::span<const std::int32_t> checked_lengths(const FlashMlaWithKvCacheArgs& a) {
  const auto lengths = check::i32_array({kOp, "cache_seqlens"}, a.cache_seqlens, a.q.shape[0]);
  check::tensor({kOp, "block_table"}, a.block_table, 2, {DType::i32});
  const std::int64_t most = a.block_table.shape[1] * kBlockSize;
  for (std::size_t r = 0; r < lengths.size(); ++r)
    check::require(
        lengths[r] >= 0 && lengths[r] <= most, {kOp, "cache_seqlens"},
        [&] { return fmt::format("from 0 to {} at index {}, the room of a table's row", most, r); },
        lengths[r]);
  return lengths;
}

/// A schedule of other lengths belongs to another batch.
void check_schedule(const FlashMlaWithKvCacheArgs& a, std::span<const std::int32_t> lengths) {
  const check::Where rows{kOp, "tile_scheduler_metadata"}, splits{kOp, "num_splits"};
  const bool given = a.tile_scheduler_metadata.defined();
  check::require(given == a.num_splits.defined(), splits,
                 "given if and only if tile_scheduler_metadata is", given ? "none" : "a tensor");
  if (!given) return;
  check::tensor(rows, a.tile_scheduler_metadata, 2, {DType::i32});
  check::shape(rows, a.tile_scheduler_metadata, {-1, 8});
  check::contiguous(rows, a.tile_scheduler_metadata);
  const std::int64_t parts = a.tile_scheduler_metadata.shape[0];
  check::require(parts >= 1 && parts <= (1 << 20), rows, "from 1 to 2^20 rows", parts);
  const auto got = check::i32_array(splits, a.num_splits, a.q.shape[0] + 1);
  const ops::MlaSchedule wanted = ops::mla_schedule(lengths, static_cast<int>(parts));
  const auto differ = std::ranges::mismatch(got, wanted.num_splits);
  if (differ.in1 != got.end())
    check::fail(
        splits,
        [&] {
          return fmt::format("{} at index {}, as get_mla_metadata gives for cache_seqlens",
                             *differ.in2, differ.in1 - got.begin());
        },
        *differ.in1);
  const auto* row = a.tile_scheduler_metadata.as<std::int32_t>();
  for (std::size_t i = 0; i < wanted.parts.size(); ++i, row += 8)
    check::require(std::equal(wanted.parts[i].begin(), wanted.parts[i].end(), row), rows,
                   "what get_mla_metadata gives for cache_seqlens",
                   [&] { return fmt::format("another row {}", i); });
}

AttentionPlan make_plan(const FlashMlaWithKvCacheArgs& a, int num_workers,
                        const KernelOptions& kernels) {
  const auto num_reqs = a.q.shape[0];
  const auto lengths = checked_lengths(a);
  check_schedule(a, lengths);
  std::vector<std::int32_t> query_start;
  for (std::int64_t r = 0; r <= num_reqs; ++r)
    query_start.push_back(static_cast<std::int32_t>(r * a.q.shape[1]));
  AttentionPlanInput in;
  in.op = kOp.data();
  in.query_start_loc = query_start;
  in.seq_lens = lengths;
  in.num_q_heads = static_cast<int>(a.q.shape[2]);
  in.num_kv_heads = 1;
  in.head_dim_qk = static_cast<int>(a.q.shape[3]);
  in.head_dim_v = a.head_dim_v;
  in.causal = a.causal;
  in.num_workers = num_workers;
  in.isa = kernels.isa;
  in.arithmetic = kernels.arithmetic;
  return plan_mla_decode(in);
}

/// What only indices give a meaning.
void check_dense(const FlashMlaWithKvCacheArgs& a) {
  for (const auto& [name, t] : {std::pair{"topk_length", a.topk_length},
                                {"attn_sink", a.attn_sink},
                                {"extra_k_cache", a.extra_k_cache},
                                {"extra_indices", a.extra_indices},
                                {"extra_topk_length", a.extra_topk_length}})
    check::require(!t.defined(), {kOp, name}, "undefined: there are no indices", "a tensor");
}

/// With indices every request has as many keys.
void check_sparse_schedule(const FlashMlaWithKvCacheArgs& a) {
  check::tensor({kOp, "indices"}, a.indices, 3, {DType::i32});
  const std::vector<std::int32_t> lengths(static_cast<std::size_t>(a.q.shape[0]),
                                          static_cast<std::int32_t>(a.indices.shape[2]));
  check_schedule(a, lengths);
}

cpu::AttentionProblem make_problem(const FlashMlaWithKvCacheArgs& a, const AttentionParams& params,
                                   const ConstTensorView& cache, const AttentionPlan& plan) {
  cpu::AttentionProblem p = ops::base_problem(params, plan, a.q.dtype);
  p.q = a.q.data;
  p.out = a.out.data;
  p.lse = a.lse.as<float>();
  p.q_layout = {false, a.q.strides[0], a.q.strides[1], a.q.strides[2]};
  p.out_layout = {false, a.out.strides[0], a.out.strides[1], a.out.strides[2]};
  p.lse_layout = {false, a.lse.strides[0], a.lse.strides[2], a.lse.strides[1]};
  ops::place_latents(p, cache, a.block_table);
  return p;
}

/// FlashMLA's LSE of a row without keys.
void mark_empty_rows(const TensorView& lse) {
  for (std::int64_t r = 0; r < lse.shape[0]; ++r) {
    for (std::int64_t h = 0; h < lse.shape[1]; ++h) {
      for (std::int64_t i = 0; i < lse.shape[2]; ++i) {
        float& x = *lse.select(0, r).select(0, h).select(0, i).as<float>();
        if (x == -std::numeric_limits<float>::infinity())
          x = std::numeric_limits<float>::infinity();
      }
    }
  }
}

}  // namespace

void flash_mla_with_kvcache(const FlashMlaWithKvCacheArgs& args, Executor* executor,
                            const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  check_tensors(args);
  if (args.indices.defined()) {
    check_sparse_schedule(args);
    ops::flash_mla_with_indices(kOp, args, run_on, kernels);
    mark_empty_rows(args.lse);
    return;
  }
  check_dense(args);
  const AttentionPlan plan = make_plan(args, run_on.num_workers(), kernels);
  AttentionParams params;
  params.scale = args.softmax_scale.value_or(1.0F / std::sqrt(static_cast<float>(args.q.shape[3])));
  params.causal = args.causal;
  ConstTensorView cache = args.k_cache.select(2, 0);
  ops::check_block_table(kOp, args.block_table, plan, kBlockSize, cache.shape[0]);
  ops::check_arithmetic(kOp, plan, args.q.dtype, cache.dtype, cache.dtype);
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes);
  ops::run_plan(make_problem(args, params, cache, plan), plan, workspace, run_on);
  mark_empty_rows(args.lse);
}

}  // namespace attend
