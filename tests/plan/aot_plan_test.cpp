// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/aot_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "attend/core/error.h"
#include "support/random.h"

namespace attend {
namespace {

struct Batch {
  std::vector<std::int32_t> query_start_loc{0}, seq_lens;
  Batch& add(int query_len, int seq_len) {
    query_start_loc.push_back(query_start_loc.back() + query_len);
    seq_lens.push_back(seq_len);
    return *this;
  }
  AttentionPlanInput input(int num_workers, int max_num_splits = 0) const {
    AttentionPlanInput in;
    in.query_start_loc = query_start_loc;
    in.seq_lens = seq_lens;
    in.num_q_heads = 8;
    in.num_kv_heads = 2;
    in.head_dim_qk = in.head_dim_v = 64;
    in.num_workers = num_workers;
    in.max_num_splits = max_num_splits;
    return in;
  }
};

constexpr AotLimits kLimits{.max_reqs = 24, .max_tokens = 500, .max_seq_len = 20000};

Batch random_batch(testing::Rng& rng) {
  Batch batch;
  const auto reqs = rng.integer(0, kLimits.max_reqs);
  int left = kLimits.max_tokens;
  for (int r = 0; r < reqs; ++r) {
    const bool prefill = rng.chance(0.1);
    const auto query_len = std::min<std::int64_t>(left, rng.integer(0, prefill ? 400 : 2));
    left -= static_cast<int>(query_len);
    batch.add(static_cast<int>(query_len),
              static_cast<int>(rng.integer(query_len, rng.chance(0.2) ? 20000 : 900)));
  }
  return batch;
}

auto fields(const WorkUnit& u) {
  return std::tuple(u.request, u.kv_head, u.q_begin, u.q_end, u.piece_begin, u.piece_end,
                    u.partial_slot, u.partial_stride);
}
auto fields(const Reduction& r) {
  return std::tuple(r.request, r.kv_head, r.q_begin, r.q_end, r.run_begin, r.run_end);
}

/// `got` begins with `want`; zeros follow.
template <typename T>
void expect_then_zeros(const std::vector<T>& got, const std::vector<T>& want) {
  ASSERT_GE(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_EQ(fields(got[i]), fields(i < want.size() ? want[i] : T{})) << i;
}

TEST(AotPlan, IsThePlanOfTheBatchInBuffersThatStay) {
  testing::Rng rng(3);
  SCOPED_TRACE(rng.trace());
  for (const auto& [workers, splits] : {std::pair{1, 0}, {2, 0}, {7, 3}, {64, 0}, {64, 1}}) {
    AotPlan aot(Batch().input(workers, splits), kLimits);
    const AttentionPlan& plan = aot.plan();
    const auto* const units = plan.units.data();
    const auto* const lens = plan.seq_lens.data();
    const auto* const starts = plan.query_start_loc.data();
    const std::size_t num_units = plan.units.size(), num_reductions = plan.reductions.size();
    const std::size_t workspace_bytes = plan.workspace_bytes;
    for (int i = 0; i < 200; ++i) {
      const Batch batch = random_batch(rng);
      aot.update(batch.input(workers, splits));
      const AttentionPlan want = plan_attention(batch.input(workers, splits));
      ASSERT_EQ(plan.query_start_loc, want.query_start_loc);
      ASSERT_EQ(plan.seq_lens, want.seq_lens);
      ASSERT_EQ(plan.key_start_loc, want.key_start_loc);
      ASSERT_EQ(plan.request_causal, want.request_causal);
      expect_then_zeros(plan.units, want.units);
      expect_then_zeros(plan.reductions, want.reductions);
      ASSERT_GE(plan.max_unit_rows, want.max_unit_rows);
      ASSERT_GE(plan.num_partial_rows, want.num_partial_rows);
      ASSERT_EQ(plan.units.size(), num_units);
      ASSERT_EQ(plan.reductions.size(), num_reductions);
      ASSERT_EQ(plan.workspace_bytes, workspace_bytes);
      ASSERT_EQ(plan.units.data(), units);
      ASSERT_EQ(plan.seq_lens.data(), lens);
      ASSERT_EQ(plan.query_start_loc.data(), starts);
    }
  }
}

/// The batch that needs most: every token a request, and one request with nearly all of the work.
TEST(AotPlan, HasRoomForBatchesAtItsLimits) {
  for (const int workers : {2, 16, 64}) {
    for (const int long_ones : {1, 4, 24}) {
      AotPlan aot(Batch().input(workers), kLimits);
      const std::size_t units = aot.plan().units.size();
      Batch batch;
      for (int r = 0; r < kLimits.max_reqs; ++r) batch.add(1, r < long_ones ? 20000 : 1);
      aot.update(batch.input(workers));
      EXPECT_EQ(aot.plan().units.size(), units);
      EXPECT_FALSE(is_work(aot.plan().units.back())) << "the bound is not reached";
    }
  }
}

TEST(AotPlan, AtMostSoManySplitsAreMade) {
  const Batch one = Batch().add(1, 20000);
  const auto parts = [&](int max_num_splits) {
    return plan_attention(one.input(64, max_num_splits)).units.size() / 2;  // a kv head
  };
  EXPECT_GT(parts(0), 8U);
  EXPECT_EQ(parts(8), 8U);
  EXPECT_EQ(parts(1), 1U);
  EXPECT_TRUE(plan_attention(one.input(64, 1)).reductions.empty());
}

void expect_refused(AotPlan& aot, const AttentionPlanInput& in, const std::string& argument) {
  const AttentionPlan before = aot.plan();
  try {
    aot.update(in);
    FAIL() << "accepted a bad " << argument;
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), argument) << e.what();
  }
  EXPECT_EQ(aot.plan().seq_lens, before.seq_lens);
  expect_then_zeros(aot.plan().units, before.units);
}

TEST(AotPlan, RefusesWhatDoesNotFitAndStaysAsItWas) {
  AotPlan aot(Batch().input(2), kLimits);
  const Batch good = Batch().add(1, 20000).add(499, 600);
  aot.update(good.input(2));
  Batch many;
  for (int r = 0; r < 25; ++r) many.add(1, 10);
  expect_refused(aot, many.input(2), "seq_lens");
  const Batch tokens = Batch().add(501, 501), keys = Batch().add(1, 20001);
  expect_refused(aot, tokens.input(2), "query_start_loc");
  expect_refused(aot, keys.input(2), "seq_lens");
  expect_refused(aot, good.input(3), "num_workers");
  expect_refused(aot, good.input(2, 4), "max_num_splits");
  AttentionPlanInput in = good.input(2);
  in.num_q_heads = 4;
  expect_refused(aot, in, "num_q_heads");
  in = good.input(2);
  in.window_left = 5;
  expect_refused(aot, in, "window_left");
  in = good.input(2);
  in.arithmetic = Arithmetic::exact;
  expect_refused(aot, in, "arithmetic");
  in = good.input(2);
  const SharedPrefix shared[] = {{0, 2, 256}};
  in.shared_prefixes = shared;
  expect_refused(aot, in, "shared_prefixes");
}

TEST(AotPlan, KeepsItsArithmetic) {
  AttentionPlanInput shape = Batch().input(2);
  shape.arithmetic = Arithmetic::exact;
  AotPlan aot(shape, kLimits);
  const Batch batch = Batch().add(1, 300);
  AttentionPlanInput in = batch.input(2);
  in.arithmetic = Arithmetic::exact;
  aot.update(in);
  EXPECT_EQ(aot.plan().arithmetic, Arithmetic::exact);
}

TEST(AotPlan, RefusesLimitsWithoutRoom) {
  for (const AotLimits& limits :
       {AotLimits{0, 1, 1}, AotLimits{1, 0, 1}, AotLimits{1, 1, 0}, AotLimits{-1, 1, 1}})
    EXPECT_THROW(AotPlan(Batch().input(1), limits), InvalidArgument);
}

}  // namespace
}  // namespace attend
