// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/attention_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "attend/core/error.h"

namespace attend {
namespace {

struct Batch {
  std::vector<std::int32_t> query_start_loc{0}, seq_lens;
  Batch& add(int query_len, int seq_len) {
    query_start_loc.push_back(query_start_loc.back() + query_len);
    seq_lens.push_back(seq_len);
    return *this;
  }
  AttentionPlanInput input(int num_workers) const {
    AttentionPlanInput in;
    in.query_start_loc = query_start_loc;
    in.seq_lens = seq_lens;
    in.num_q_heads = 8;
    in.num_kv_heads = 2;
    in.head_dim_qk = in.head_dim_v = 64;
    in.num_workers = num_workers;
    return in;
  }
};

Batch mixed() { return Batch().add(1, 20000).add(1, 300).add(0, 0).add(150, 3000).add(64, 64); }

/// (request, kv head, query token, piece) of every piece that some unit computes.
using Cell = std::tuple<int, int, int, int>;
std::map<Cell, int> covered(const AttentionPlan& plan) {
  std::map<Cell, int> count;
  for (const WorkUnit& u : plan.units)
    for (int q = u.q_begin; q < u.q_end; ++q)
      for (int piece = u.piece_begin; piece < u.piece_end; ++piece)
        ++count[{u.request, u.kv_head, q, piece}];
  return count;
}

TEST(AttentionPlan, CoversEveryVisiblePieceOnce) {
  const Batch batch = mixed();
  for (const int workers : {1, 2, 7, 64}) {
    const AttentionPlan plan = plan_attention(batch.input(workers));
    const auto count = covered(plan);
    for (const auto& [cell, times] : count) ASSERT_EQ(times, 1);
    for (int r = 0; r < plan.num_reqs(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      const int query_len = batch.query_start_loc[i + 1] - batch.query_start_loc[i];
      for (int h = 0; h < 2; ++h)
        for (int q = 0; q < query_len; ++q) {
          const int last_key = q + batch.seq_lens[i] - query_len;
          for (int piece = 0; piece * kPieceSize <= last_key; ++piece)
            ASSERT_TRUE(count.contains({r, h, q, piece})) << r << " " << q << " " << piece;
        }
    }
  }
}

TEST(AttentionPlan, SplitUnitsHaveRoomOfTheirOwn) {
  const AttentionPlan plan = plan_attention(mixed().input(64));
  ASSERT_FALSE(plan.reductions.empty());
  std::vector<bool> used(static_cast<std::size_t>(plan.num_partial_rows), false);
  for (const WorkUnit& u : plan.units) {
    if (u.partial_slot < 0) continue;
    const std::int64_t rows = std::int64_t{u.q_end - u.q_begin} * 4;
    for (std::int64_t i = 0; i < rows * (u.piece_end - u.piece_begin); ++i) {
      const auto slot = static_cast<std::size_t>(u.partial_slot + i);
      ASSERT_LT(slot, used.size());
      ASSERT_FALSE(used[slot]);
      used[slot] = true;
    }
  }
  EXPECT_TRUE(std::all_of(used.begin(), used.end(), [](bool b) { return b; }));
}

TEST(AttentionPlan, WindowsLeaveOutWhatNoRowSees) {
  const Batch batch = Batch().add(1, 100000);
  AttentionPlanInput in = batch.input(1);
  in.window_left = 511;
  const AttentionPlan plan = plan_attention(in);
  for (const WorkUnit& u : plan.units) {
    EXPECT_EQ(u.piece_begin, (99999 - 511) / kPieceSize);
    EXPECT_EQ(u.piece_end, 99999 / kPieceSize + 1);
  }
}

TEST(AttentionPlan, GivesEveryWorkerUnitsOfALongPrompt) {
  const Batch batch = Batch().add(4096, 4096);
  for (const int workers : {1, 2, 8}) {
    const AttentionPlan plan = plan_attention(batch.input(workers));
    EXPECT_GE(plan.units.size(), static_cast<std::size_t>(4 * workers));
    EXPECT_LE(plan.max_unit_rows, 1024);
  }
}

void expect_refused(const AttentionPlanInput& in, const std::string& argument) {
  try {
    plan_attention(in);
    FAIL() << "accepted a bad " << argument;
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), argument) << e.what();
    EXPECT_EQ(e.op(), "plan_attention");
  }
}

TEST(AttentionPlan, RefusesBadInput) {
  const Batch good = mixed();
  Batch bad = good;
  bad.query_start_loc[0] = 1;
  expect_refused(bad.input(1), "query_start_loc");
  bad = good;
  bad.query_start_loc[2] = 0;
  expect_refused(bad.input(1), "query_start_loc");
  bad = good;
  bad.seq_lens[1] = -1;
  expect_refused(bad.input(1), "seq_lens");
  bad = good;
  bad.seq_lens.pop_back();
  expect_refused(bad.input(1), "seq_lens");
  AttentionPlanInput in = good.input(1);
  in.num_q_heads = 7;
  expect_refused(in, "num_q_heads");
  in = good.input(1);
  in.head_dim_qk = 12;
  expect_refused(in, "head_dim_qk");
  in = good.input(1);
  in.head_dim_v = 264;
  expect_refused(in, "head_dim_v");
  in = good.input(1);
  in.window_left = -2;
  expect_refused(in, "window_left");
  expect_refused(good.input(0), "num_workers");
}

}  // namespace
}  // namespace attend
