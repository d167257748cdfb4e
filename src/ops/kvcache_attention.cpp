// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <vector>

#include "attend/ops/attention.h"
#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/rotary.h"

namespace attend {
namespace {

using Args = FlashAttnWithKvCacheArgs;
constexpr std::string_view kOp = "flash_attn_with_kvcache";

bool is_paged(const Args& a) { return a.block_table.defined(); }
bool appends(const Args& a) { return a.k_new.defined(); }

std::int64_t int_or(const ConstTensorView& t, std::int64_t i, std::int64_t missing) {
  return t.defined() ? t.as<std::int32_t>()[i] : missing;
}

void check_written(std::string_view name, const TensorView& t, const Args& a) {
  check::distinct_elements({kOp, name}, t);
  check::no_overlap({kOp, name}, t, "q", a.q);
  if (appends(a)) {
    check::no_overlap({kOp, name}, t, "k_new", a.k_new);
    check::no_overlap({kOp, name}, t, "v_new", a.v_new);
  }
}

void check_tensors(const Args& a) {
  ops::check_qkv(kOp, a.q, {"k_cache", "v_cache", a.k_cache, a.v_cache, true}, a.out, 4);
  if (is_paged(a)) ops::check_block_size(kOp, "k_cache", a.k_cache);
  if (a.lse.defined()) {
    check::tensor({kOp, "lse"}, a.lse, 3, {DType::f32});
    check::shape({kOp, "lse"}, a.lse, {a.q.shape[0], a.q.shape[2], a.q.shape[1]});
    check_written("lse", a.lse, a);
    check::no_overlap({kOp, "lse"}, a.lse, "k_cache", a.k_cache);
    check::no_overlap({kOp, "lse"}, a.lse, "v_cache", a.v_cache);
    check::no_overlap({kOp, "lse"}, a.lse, "out", a.out);
  }
}

void check_appended(const Args& a) {
  check::require(a.k_new.defined() == a.v_new.defined(), {kOp, "v_new"},
                 "k_new and v_new together or neither", a.v_new.defined() ? "v_new" : "k_new");
  if (!appends(a)) return;
  const std::int64_t batch = a.q.shape[0], heads = a.k_cache.shape[2];
  check::tensor({kOp, "k_new"}, a.k_new, 4, {a.q.dtype});
  check::tensor({kOp, "v_new"}, a.v_new, 4, {a.q.dtype});
  check::shape({kOp, "k_new"}, a.k_new, {batch, -1, heads, a.k_cache.shape[3]});
  check::shape({kOp, "v_new"}, a.v_new, {batch, a.k_new.shape[1], heads, a.v_cache.shape[3]});
  check::unit_last_stride({kOp, "k_new"}, a.k_new);
  check::unit_last_stride({kOp, "v_new"}, a.v_new);
  check::no_overlap({kOp, "out"}, a.out, "k_new", a.k_new);
  check::no_overlap({kOp, "out"}, a.out, "v_new", a.v_new);
  check_written("k_cache", a.k_cache, a);
  check_written("v_cache", a.v_cache, a);
  check::no_overlap({kOp, "k_cache"}, a.k_cache, "v_cache", a.v_cache);
}

void check_rotary(const Args& a, std::int64_t last_position) {
  check::require(a.rotary_cos.defined() == a.rotary_sin.defined(), {kOp, "rotary_sin"},
                 "rotary_cos and rotary_sin together or neither", "one of them");
  if (!a.rotary_cos.defined()) return;
  check::require(appends(a), {kOp, "rotary_cos"}, "k_new given (keys in the cache are rotated)",
                 "no k_new");
  check::tensor({kOp, "rotary_cos"}, a.rotary_cos, 2, {a.q.dtype});
  check::tensor({kOp, "rotary_sin"}, a.rotary_sin, 2, {a.q.dtype});
  const std::int64_t dim = 2 * a.rotary_cos.shape[1];
  check::require(
      dim > 0 && dim % 16 == 0 && dim <= a.q.shape[3], {kOp, "rotary_cos"},
      [&] { return fmt::format("2 * columns a multiple of 16, at most {}", a.q.shape[3]); }, dim);
  check::shape({kOp, "rotary_sin"}, a.rotary_sin, {a.rotary_cos.shape[0], dim / 2});
  check::unit_last_stride({kOp, "rotary_cos"}, a.rotary_cos);
  check::unit_last_stride({kOp, "rotary_sin"}, a.rotary_sin);
  check::require(
      last_position < a.rotary_cos.shape[0], {kOp, "rotary_cos"},
      [&] { return fmt::format("at least {} rows (positions)", last_position + 1); },
      a.rotary_cos.shape[0]);
}

/// Rows of one request: valid before the append, padding, and the capacity of its part of the
/// cache.
struct RequestRows {
  std::int64_t cached, leftpad, capacity;
};

RequestRows request_rows(const Args& a, std::int64_t r) {
  const std::int64_t capacity =
      is_paged(a) ? a.block_table.shape[1] * a.k_cache.shape[1] : a.k_cache.shape[1];
  return {int_or(a.cache_seqlens, r, a.k_cache.shape[1]), int_or(a.cache_leftpad, r, 0), capacity};
}

/// No written tensor may hold what tells where or how to read.
void check_side_inputs(const Args& a) {
  for (const auto& [name, t] : {std::pair{"alibi_slopes", a.params.alibi_slopes},
                                {"sinks", a.params.sinks},
                                {"block_table", a.block_table},
                                {"cache_seqlens", a.cache_seqlens},
                                {"cache_batch_idx", a.cache_batch_idx},
                                {"cache_leftpad", a.cache_leftpad},
                                {"rotary_cos", a.rotary_cos},
                                {"rotary_sin", a.rotary_sin}}) {
    if (!t.defined()) continue;
    check::no_overlap({kOp, "out"}, a.out, name, t);
    if (a.lse.defined()) check::no_overlap({kOp, "lse"}, a.lse, name, t);
    if (!appends(a)) continue;
    check::no_overlap({kOp, "k_cache"}, a.k_cache, name, t);
    check::no_overlap({kOp, "v_cache"}, a.v_cache, name, t);
  }
}

void check_index_arrays(const Args& a) {
  const std::int64_t batch = a.q.shape[0];
  for (const auto& [name, t] : {std::pair{"cache_seqlens", a.cache_seqlens},
                                {"cache_batch_idx", a.cache_batch_idx},
                                {"cache_leftpad", a.cache_leftpad}}) {
    if (t.defined()) check::i32_array({kOp, name}, t, batch);
  }
  if (is_paged(a)) {
    check::require(!a.cache_batch_idx.defined(), {kOp, "cache_batch_idx"},
                   "undefined with a block_table", "defined");
    check::require(!a.cache_leftpad.defined(), {kOp, "cache_leftpad"},
                   "undefined with a block_table", "defined");
    check::require(a.cache_seqlens.defined(), {kOp, "cache_seqlens"}, "given with a block_table",
                   "undefined");
    check::tensor({kOp, "block_table"}, a.block_table, 2, {DType::i32});
    check::shape({kOp, "block_table"}, a.block_table, {batch, -1});
  } else if (!a.cache_batch_idx.defined()) {
    check::require(
        a.k_cache.shape[0] >= batch, {kOp, "k_cache"},
        [&] { return fmt::format("at least {} rows, one a request", batch); }, a.k_cache.shape[0]);
  }
}

/// Checks each request's lengths; returns its number of keys after the append.
std::vector<std::int32_t> checked_lengths(const Args& a) {
  std::vector<std::int32_t> keys;
  std::vector<bool> row_used(static_cast<std::size_t>(a.k_cache.shape[0]), false);
  const std::int64_t appended = appends(a) ? a.k_new.shape[1] : 0;
  for (std::int64_t r = 0; r < a.q.shape[0]; ++r) {
    const RequestRows n = request_rows(a, r);
    check::require(
        n.cached >= 0 && n.cached + appended <= n.capacity, {kOp, "cache_seqlens"},
        [&] {
          return fmt::format("in [0, {}] at index {} (capacity {}, {} new rows)",
                             n.capacity - appended, r, n.capacity, appended);
        },
        n.cached);
    check::require(
        n.leftpad >= 0 && n.leftpad <= n.cached, {kOp, "cache_leftpad"},
        [&] { return fmt::format("in [0, {}] at index {}", n.cached, r); }, n.leftpad);
    keys.push_back(static_cast<std::int32_t>(n.cached - n.leftpad + appended));
    if (!a.cache_batch_idx.defined()) continue;
    const std::int64_t row = int_or(a.cache_batch_idx, r, r);
    check::require(
        row >= 0 && row < a.k_cache.shape[0], {kOp, "cache_batch_idx"},
        [&] { return fmt::format("in [0, {}) at index {}", a.k_cache.shape[0], r); }, row);
    check::require(
        !(appends(a) && row_used[static_cast<std::size_t>(row)]), {kOp, "cache_batch_idx"},
        [&] { return fmt::format("distinct rows when appending, at index {}", r); }, row);
    row_used[static_cast<std::size_t>(row)] = true;
  }
  return keys;
}

AttentionPlan make_plan(const Args& a, std::span<const std::int32_t> keys, int num_workers,
                        const KernelOptions& kernels) {
  std::vector<std::int32_t> starts(1, 0);
  const std::int64_t total = a.q.shape[0] * a.q.shape[1];
  check::require(total <= INT32_MAX, {kOp, "q"}, "fewer than 2^31 query tokens", total);
  for (std::size_t r = 0; r < keys.size(); ++r)
    starts.push_back(starts.back() + static_cast<std::int32_t>(a.q.shape[1]));
  AttentionPlanInput in;
  in.op = kOp.data();
  in.query_start_loc = starts;
  in.seq_lens = keys;
  in.num_q_heads = static_cast<int>(a.q.shape[2]);
  in.num_kv_heads = static_cast<int>(a.k_cache.shape[2]);
  in.head_dim_qk = static_cast<int>(a.q.shape[3]);
  in.head_dim_v = static_cast<int>(a.v_cache.shape[3]);
  in.causal = a.params.causal;
  in.window_left = a.params.window_left;
  in.window_right = a.params.window_right;
  in.num_workers = num_workers;
  in.isa = kernels.isa;
  in.arithmetic = kernels.arithmetic;
  return plan_attention(in);
}

std::byte* cache_row(const Args& a, const TensorView& cache, std::int64_t r, std::int64_t position,
                     std::int64_t head) {
  std::int64_t row = int_or(a.cache_batch_idx, r, r), offset = position;
  if (is_paged(a)) {
    const std::int64_t block_size = cache.shape[1];
    row = a.block_table.as<std::int32_t>()[r * a.block_table.strides[0] + position / block_size];
    offset = position % block_size;
  }
  return static_cast<std::byte*>(cache.select(2, head).select(1, offset).select(0, row).data);
}

void append(const Args& a, const ops::RotaryTables& tables) {
  const std::int64_t new_rows = a.k_new.shape[1], heads = a.k_new.shape[2];
  for (std::int64_t r = 0; r < a.k_new.shape[0]; ++r) {
    const std::int64_t first = request_rows(a, r).cached;
    for (std::int64_t i = 0; i < new_rows; ++i)
      for (std::int64_t h = 0; h < heads; ++h) {
        const void* k = a.k_new.select(2, h).select(1, i).select(0, r).data;
        const void* v = a.v_new.select(2, h).select(1, i).select(0, r).data;
        ops::rotate_row(tables, first + i, k, cache_row(a, a.k_cache, r, first + i, h),
                        a.k_new.shape[3], a.q.dtype);
        std::memcpy(cache_row(a, a.v_cache, r, first + i, h), v,
                    static_cast<std::size_t>(a.v_new.shape[3]) * size_of(a.q.dtype));
      }
  }
}

/// Rotated copy of q, contiguous, at `to`.
TensorView rotated_queries(const Args& a, const ops::RotaryTables& tables, void* to) {
  TensorView q(to, a.q.dtype, std::span(a.q.shape.data(), 4));
  const bool local = a.params.causal || a.params.window_left >= 0 || a.params.window_right >= 0;
  for (std::int64_t r = 0; r < q.shape[0]; ++r)
    for (std::int64_t i = 0; i < q.shape[1]; ++i)
      for (std::int64_t h = 0; h < q.shape[2]; ++h)
        ops::rotate_row(tables, request_rows(a, r).cached + (local ? i : 0),
                        a.q.select(2, h).select(1, i).select(0, r).data,
                        q.select(2, h).select(1, i).select(0, r).data, q.shape[3], q.dtype);
  return q;
}

cpu::AttentionProblem make_problem(const Args& a, const ConstTensorView& q,
                                   const AttentionPlan& plan) {
  cpu::AttentionProblem p = ops::base_problem(a.params, plan, a.q.dtype);
  p.q = q.data;
  p.k = a.k_cache.data;
  p.v = a.v_cache.data;
  p.out = a.out.data;
  p.q_layout = {false, q.strides[0], q.strides[1], q.strides[2]};
  p.out_layout = {false, a.out.strides[0], a.out.strides[1], a.out.strides[2]};
  if (a.lse.defined()) {
    p.lse = a.lse.as<float>();
    p.lse_layout = {false, a.lse.strides[0], a.lse.strides[2], a.lse.strides[1]};
  }
  p.k_strides = {a.k_cache.strides[0], a.k_cache.strides[1], a.k_cache.strides[2]};
  p.v_strides = {a.v_cache.strides[0], a.v_cache.strides[1], a.v_cache.strides[2]};
  if (is_paged(a)) {
    p.block_table = a.block_table.as<std::int32_t>();
    p.block_table_stride = a.block_table.strides[0];
    p.block_size = static_cast<int>(a.k_cache.shape[1]);
  }
  if (a.cache_batch_idx.defined()) p.batch_idx = a.cache_batch_idx.as<std::int32_t>();
  if (a.cache_leftpad.defined()) p.leftpad = a.cache_leftpad.as<std::int32_t>();
  return p;
}

/// Block ids that the append writes; those that attention reads are checked with the plan.
void check_append_blocks(const Args& a) {
  if (!is_paged(a) || !appends(a)) return;
  const std::int64_t block_size = a.k_cache.shape[1];
  for (std::int64_t r = 0; r < a.q.shape[0]; ++r) {
    const std::int64_t first = request_rows(a, r).cached;
    const std::int64_t end = first + a.k_new.shape[1];
    for (std::int64_t b = first / block_size; b * block_size < end; ++b) {
      const std::int32_t id = a.block_table.as<std::int32_t>()[r * a.block_table.strides[0] + b];
      check::require(
          id >= 0 && id < a.k_cache.shape[0], {kOp, "block_table"},
          [&] { return fmt::format("block ids in [0, {}) at [{}, {}]", a.k_cache.shape[0], r, b); },
          id);
    }
  }
}

}  // namespace

void flash_attn_with_kvcache(const Args& a, Executor* executor, const KernelOptions& kernels) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  check_tensors(a);
  check_appended(a);
  check_index_arrays(a);
  const std::vector<std::int32_t> keys = checked_lengths(a);
  const AttentionPlan plan = make_plan(a, keys, run_on.num_workers(), kernels);
  ops::check_params(kOp, a.params, plan.num_reqs(), plan.num_q_heads);
  if (is_paged(a)) {
    ops::check_block_table(kOp, a.block_table, plan, static_cast<int>(a.k_cache.shape[1]),
                           a.k_cache.shape[0]);
    check_append_blocks(a);
  }
  std::int64_t last_position = -1;
  for (std::int64_t r = 0; r < a.q.shape[0]; ++r) {
    const std::int64_t rotated = std::max(a.q.shape[1], appends(a) ? a.k_new.shape[1] : 0);
    last_position = std::max(last_position, request_rows(a, r).cached + rotated - 1);
  }
  check_rotary(a, last_position);
  check_side_inputs(a);
  ops::check_arithmetic(kOp, plan, a.q.dtype, a.k_cache.dtype, a.v_cache.dtype);

  const ops::RotaryTables tables{a.rotary_cos, a.rotary_sin, a.rotary_interleaved};
  const std::size_t q_bytes =
      tables.defined() ? static_cast<std::size_t>(a.q.numel()) * size_of(a.q.dtype) : 0;
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes + q_bytes);
  if (appends(a)) append(a, tables);
  const Workspace for_plan{workspace.data, plan.workspace_bytes};
  const ConstTensorView q =
      tables.defined()
          ? rotated_queries(a, tables,
                            static_cast<std::byte*>(workspace.data) + plan.workspace_bytes)
          : a.q;
  ops::run_plan(make_problem(a, q, plan), plan, for_plan, run_on);
}

}  // namespace attend
