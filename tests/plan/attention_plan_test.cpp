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
  const auto start = [&](int r) { return plan.query_start_loc[static_cast<std::size_t>(r)]; };
  for (const WorkUnit& u : plan.units)
    for (int q = u.q_begin; q < u.q_end; ++q) {
      int request = u.request;  // a unit of a shared prefix goes on into the next requests
      while (start(u.request) + q >= start(request + 1)) ++request;
      for (int piece = u.piece_begin; piece < u.piece_end; ++piece)
        ++count[{request, u.kv_head, start(u.request) + q - start(request), piece}];
    }
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

/// Marks the rows of `count` consecutive partials, each of which must be free.
void take_partials(std::vector<bool>& used, std::int64_t slot, std::int64_t stride,
                   std::int64_t rows, int count) {
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t row = 0; row < rows; ++row) {
      const auto at = static_cast<std::size_t>(slot + i * stride + row);
      ASSERT_LT(at, used.size());
      ASSERT_FALSE(used[at]);
      used[at] = true;
    }
}

/// Every partial has room of its own, and exactly what units store is reduced, once.
void expect_partials_fit(const AttentionPlan& plan) {
  const auto rows = [](const auto& u) { return std::int64_t{u.q_end - u.q_begin} * 4; };
  const auto count = static_cast<std::size_t>(plan.num_partial_rows);
  std::vector<bool> stored(count, false), reduced(count, false);
  for (const WorkUnit& u : plan.units) {
    if (u.partial_slot < 0) continue;
    take_partials(stored, u.partial_slot, u.partial_stride, rows(u),
                  u.partial_stride == 0 ? 1 : u.piece_end - u.piece_begin);
  }
  for (const Reduction& reduction : plan.reductions)
    for (int i = reduction.run_begin; i < reduction.run_end; ++i) {
      const PartialRun& run = plan.partial_runs[static_cast<std::size_t>(i)];
      take_partials(reduced, run.slot, run.stride, rows(reduction), run.num_pieces);
    }
  EXPECT_EQ(stored, reduced);
  EXPECT_TRUE(std::all_of(stored.begin(), stored.end(), [](bool b) { return b; }));
}

TEST(AttentionPlan, SplitUnitsHaveRoomOfTheirOwn) {
  const AttentionPlan plan = plan_attention(mixed().input(64));
  ASSERT_FALSE(plan.reductions.empty());
  expect_partials_fit(plan);
}

Batch sharing() {
  return Batch().add(1, 3000).add(2, 2600).add(0, 2100).add(1, 2048).add(300, 5000).add(1, 9);
}
const SharedPrefix kNested[] = {{0, 5, 1000}, {1, 4, 2048}};

TEST(AttentionPlan, SharedPrefixesCoverEveryVisiblePieceOnce) {
  const Batch batch = sharing();
  for (const int workers : {1, 2, 7, 64}) {
    AttentionPlanInput in = batch.input(workers);
    const auto flat = covered(plan_attention(in));
    in.shared_prefixes = kNested;
    const AttentionPlan plan = plan_attention(in);
    EXPECT_EQ(covered(plan), flat);
    expect_partials_fit(plan);
    const auto shared = std::count_if(plan.units.begin(), plan.units.end(), [](const WorkUnit& u) {
      return u.request == 0 && u.q_end > 1 && u.piece_end <= 3;
    });
    EXPECT_GE(shared, 2) << "one unit a kv head";
  }
}

TEST(AttentionPlan, PrefixesOfLessThanAPieceAreNotShared) {
  const Batch batch = sharing();
  AttentionPlanInput in = batch.input(2);
  const SharedPrefix small[] = {{0, 5, kPieceSize - 1}};
  in.shared_prefixes = small;
  const AttentionPlan plan = plan_attention(in), flat = plan_attention(batch.input(2));
  EXPECT_EQ(plan.units.size(), flat.units.size());
  EXPECT_EQ(plan.num_partial_rows, flat.num_partial_rows);
}

TEST(AttentionPlan, OutermostPrefixesStoreOnePartialARow) {
  Batch batch;
  for (int r = 0; r < 64; ++r) batch.add(1, 8192 + 100);
  AttentionPlanInput in = batch.input(2);
  const SharedPrefix all[] = {{0, 64, 8192}};
  in.shared_prefixes = all;
  const AttentionPlan plan = plan_attention(in);
  EXPECT_EQ(plan.num_partial_rows, 64 * 8 * 2) << "one of the prefix, one of the last piece";
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

TEST(AttentionPlan, RefusesBadSharedPrefixes) {
  const Batch batch = sharing();
  const auto refuse = [&](std::initializer_list<SharedPrefix> prefixes) {
    AttentionPlanInput in = batch.input(2);
    in.shared_prefixes = std::span(prefixes.begin(), prefixes.size());
    expect_refused(in, "shared_prefixes");
  };
  refuse({{-1, 2, 256}});
  refuse({{2, 2, 256}});
  refuse({{0, 7, 256}});
  refuse({{0, 2, 0}});
  refuse({{0, 2, -256}});
  refuse({{3, 5, 2049}});  // longer than request 3
  refuse({{0, 3, 256}, {2, 4, 512}});
  refuse({{0, 3, 256}, {1, 2, 256}});
  refuse({{1, 2, 256}, {0, 3, 512}});
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
  in.head_dim_v = 520;
  expect_refused(in, "head_dim_v");
  in = good.input(1);
  in.head_dim_qk = 584;
  expect_refused(in, "head_dim_qk");
  in = good.input(1);
  in.window_left = -2;
  expect_refused(in, "window_left");
  expect_refused(good.input(0), "num_workers");
}

TEST(AttentionPlan, HasHeadsAsLargeAsThoseOfLatentAttention) {
  const Batch batch = mixed();
  AttentionPlanInput in = batch.input(7);
  in.head_dim_qk = kMaxHeadDimQk;
  in.head_dim_v = kMaxHeadDimV;
  EXPECT_EQ(kMaxHeadDimQk, 576);
  EXPECT_EQ(kMaxHeadDimV, 512);
  const AttentionPlan plan = plan_attention(in);
  for (const auto& [cell, times] : covered(plan)) ASSERT_EQ(times, 1);
  // Larger heads, smaller units: what a unit holds must stay in L2.
  const std::vector<std::int32_t> query_start_loc{0, 4096}, seq_lens{4096};
  AttentionPlanInput prompt;
  prompt.query_start_loc = query_start_loc;
  prompt.seq_lens = seq_lens;
  prompt.num_q_heads = prompt.num_kv_heads = 4;
  prompt.head_dim_qk = prompt.head_dim_v = 128;
  const int usual = plan_attention(prompt).max_unit_rows;
  prompt.head_dim_qk = kMaxHeadDimQk;
  prompt.head_dim_v = kMaxHeadDimV;
  EXPECT_LT(plan_attention(prompt).max_unit_rows, usual);
}

}  // namespace
}  // namespace attend
