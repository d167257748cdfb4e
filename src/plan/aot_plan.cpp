// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/aot_plan.h"

#include <algorithm>

#include "core/check.h"
#include "plan/plan_checks.h"
#include "plan/planner.h"
#include "plan/unit_layout.h"
#include "plan/unit_size.h"

namespace attend {
namespace {

/// Most entries of a plan within the limits.
struct Capacity {
  std::int64_t whole;  ///< units before they are split
  std::int64_t units, reductions, partial_rows;
  int unit_rows;
};

/// A unit is split if it costs more than twice the target, which is a 4W-th of all work, rounded
/// down but at least 1 (W workers): at most 4W units are split, into at most 8W parts together.
Capacity capacity_of(const AttentionPlan& p, const AotLimits& limits) {
  Capacity c{};
  const int group = p.num_q_heads / p.num_kv_heads;
  const std::int64_t step = std::max(1, plan::kMinUnitRows / group);  // query tokens of a unit
  const std::int64_t tokens = limits.max_tokens;
  c.whole = std::min(tokens, limits.max_reqs + tokens / step) * p.num_kv_heads;
  const std::int64_t share = std::int64_t{plan::kUnitsPerWorker} * p.num_workers;
  const bool splits = p.num_workers > 1 && p.max_num_splits != 1;
  c.reductions = splits ? std::min(c.whole, share) : 0;
  c.units = c.whole + (splits ? 2 * share : 0);
  const std::int64_t pieces = (std::int64_t{limits.max_seq_len} + kPieceSize - 1) / kPieceSize;
  // Split units are fewer than 20W/9, or all work is less than 40W and so are rows times pieces.
  const std::int64_t most_split = std::min(c.reductions, 20 * p.num_workers / 9 + std::int64_t{1});
  const std::int64_t split_rows =
      std::min(most_split * plan::kBlockRows, tokens * p.num_q_heads) * pieces;
  c.partial_rows = splits ? std::max(split_rows, std::int64_t{40} * p.num_workers) : 0;
  c.unit_rows =
      static_cast<int>(std::min<std::int64_t>(tokens * group, std::max(plan::kMaxUnitRows, group)));
  return c;
}

void check_limits(const char* op, const AotLimits& limits) {
  const auto at_least_one = [&](std::string_view name, int n) {
    check::require(n >= 1, {op, name}, ">= 1", n);
  };
  at_least_one("max_reqs", limits.max_reqs);
  at_least_one("max_tokens", limits.max_tokens);
  at_least_one("max_seq_len", limits.max_seq_len);
}

void check_fits(const AttentionPlanInput& in, const AotLimits& limits) {
  const auto at_most = [&](std::string_view name, std::int64_t n, std::int64_t most,
                           std::string_view what) {
    check::require(
        n <= most, {in.op, name}, [&] { return fmt::format("at most {} {}", most, what); }, n);
  };
  at_most("seq_lens", static_cast<std::int64_t>(in.seq_lens.size()), limits.max_reqs, "requests");
  at_most("query_start_loc", in.query_start_loc.back(), limits.max_tokens, "query tokens");
  for (const std::int32_t n : in.seq_lens) at_most("seq_lens", n, limits.max_seq_len, "keys");
  check::require(in.shared_prefixes.empty(), {in.op, "shared_prefixes"},
                 "none (a plan made ahead has no room for them)", in.shared_prefixes.size());
}

void check_same_shape(const AttentionPlanInput& in, const AttentionPlan& p) {
  const auto same = [&](std::string_view name, int planned, int got) {
    check::require(
        planned == got, {in.op, name}, [&] { return fmt::format("{}, as before", planned); }, got);
  };
  same("num_q_heads", p.num_q_heads, in.num_q_heads);
  same("num_kv_heads", p.num_kv_heads, in.num_kv_heads);
  same("head_dim_qk", p.head_dim_qk, in.head_dim_qk);
  same("head_dim_v", p.head_dim_v, in.head_dim_v);
  same("branches", p.branches, in.branches);
  same("window_left", p.window_left, in.window_left);
  same("window_right", p.window_right, in.window_right);
  same("num_workers", p.num_workers, in.num_workers);
  same("max_num_splits", p.max_num_splits, in.max_num_splits);
  check::require(
      p.arithmetic == in.arithmetic, {in.op, "arithmetic"},
      [&] { return fmt::format("{}, as before", to_string(p.arithmetic)); },
      to_string(in.arithmetic));
}

}  // namespace

struct AotPlan::Scratch {
  plan::PlannerScratch planner;
  Capacity capacity;
};

AotPlan::AotPlan(const AttentionPlanInput& shape, const AotLimits& limits)
    : limits_(limits), scratch_(std::make_unique<Scratch>()) {
  plan::check_shape(shape);
  check_limits(shape.op, limits);
  plan::set_shape(plan_, shape);
  const Capacity c = scratch_->capacity = capacity_of(plan_, limits);
  const auto reserve = [](auto& vector, std::int64_t n) {
    vector.reserve(static_cast<std::size_t>(n));
  };
  reserve(plan_.query_start_loc, limits.max_reqs + std::int64_t{1});
  reserve(plan_.key_start_loc, limits.max_reqs + std::int64_t{1});
  reserve(plan_.seq_lens, limits.max_reqs);
  reserve(plan_.request_causal, limits.max_reqs);
  reserve(plan_.units, c.units);
  reserve(plan_.reductions, c.reductions);
  reserve(plan_.partial_runs, c.reductions);
  reserve(scratch_->planner.whole, c.whole);
  reserve(scratch_->planner.innermost, limits.max_reqs);
  constexpr std::int32_t kNoRequests[] = {0};
  AttentionPlanInput empty = shape;
  empty.query_start_loc = kNoRequests;
  empty.seq_lens = {};
  empty.request_causal = {};
  empty.shared_prefixes = {};
  update(empty);
}

AotPlan::~AotPlan() = default;

void AotPlan::update(const AttentionPlanInput& batch) {
  plan::check_lengths(batch);
  check_same_shape(batch, plan_);
  check_fits(batch, limits_);
  const Capacity& c = scratch_->capacity;
  plan::set_lengths(plan_, batch);
  plan::make_units(plan_, scratch_->planner);
  plan_.units.resize(static_cast<std::size_t>(c.units));
  plan_.reductions.resize(static_cast<std::size_t>(c.reductions));
  // The workspace is laid out by these two, so that its size and its addresses stay.
  plan_.max_unit_rows = c.unit_rows;
  plan_.num_partial_rows = c.partial_rows;
  plan_.workspace_bytes = plan::workspace_bytes(plan_);
}

}  // namespace attend
