// SPDX-License-Identifier: Apache-2.0
// Rows of differential_attention have the same bits whatever is around them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "differential_batch.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

using Options = DifferentialBatchOptions;
using Batch = DifferentialBatch;
using Rows = Batch::Rows;

/// `got` has rows of `wanted` only, and they have the same bits.
void expect_same(const Rows& got, const Rows& wanted) {
  ASSERT_FALSE(got.empty());
  for (const auto& [key, bytes] : got) {
    ASSERT_TRUE(wanted.contains(key));
    ASSERT_EQ(bytes, wanted.at(key)) << "request " << key.first << " position " << key.second;
  }
}

std::vector<Options> kinds() {
  std::vector<Options> all(scaled(5, 2));
  all[0].pairing = HeadPairing::halves;
  all[1].dtype = all[1].cache = DType::f32;
  all[1].hnd = true;
  if (all.size() == 2) return all;
  all[2].cache = DType::fp8_e4m3;
  all[3].variant = DifferentialVariant::v2;
  all[3].dtype = all[3].cache = DType::f16;
  all[4].maps = true;
  return all;
}

class DifferentialBits : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(DifferentialBits, DoNotDependOnNeighboursPlacesOrTokensACall) {
  const auto pool = make_thread_pool(3);
  for (Options o : kinds()) {
    Batch crowd(o, {{3, 90, 1}, {0, 560, 4}, {1, 256, 1}, {2, 17, 9}, {5, 0, 1}});
    const Rows wanted = crowd.run(pool.get(), GetParam());
    EXPECT_FALSE(has_nan(crowd.result()));
    for (const unsigned placement : {1U, 2U}) {
      for (const int block_size : {48, 16, 256, 0}) {
        o.placement = placement;
        o.block_size = block_size;
        o.hnd = !o.hnd;
        SCOPED_TRACE(block_size);
        expect_same(Batch(o, {{0, 560, 4}}).run(nullptr, GetParam()), wanted);
      }
    }
    o.block_size = 16;
    for (int keys = 557; keys <= 560; ++keys)
      expect_same(Batch(o, {{0, keys, 1}}).run(nullptr, GetParam()), wanted);
    expect_same(Batch(o, {{2, 15, 7}, {1, 256, 1}}).run(nullptr, GetParam()), wanted);
  }
}

TEST_P(DifferentialBits, DoNotDependOnHowAPromptIsCut) {
  constexpr int kKeys = 300;
  for (const Options& o : kinds()) {
    Rows wanted = Batch(o, {{0, kKeys, kKeys}}).run(nullptr, GetParam());
    wanted.merge(Batch(o, {{7, 33, 1}}).run(nullptr, GetParam()));
    for (const int chunk : {1 + kKeys / 2, 64, 97}) {
      for (int end = kKeys; end > 0; end -= chunk) {
        Batch step(o, {{7, 33, 1}, {0, end, std::min(end, chunk)}});
        expect_same(step.run(nullptr, GetParam()), wanted);
      }
    }
  }
}

TEST_P(DifferentialBits, DoNotDependOnWorkersOrSplits) {
  for (Options o : kinds()) {
    o.kv_heads = 2;
    Batch batch(o, {{0, scaled(1900, 800), 2}, {1, 37, 2}, {2, 258, 1}});
    const auto one = make_thread_pool(1);
    const Rows wanted = batch.run(one.get(), GetParam());
    bool split = false;
    for (const int workers : {1, 2, 3}) {
      const auto pool = make_thread_pool(workers);
      for (const int splits : {0, 1, 2, 5}) {
        AttentionPlanInput in = batch.plan_input(workers);
        in.max_num_splits = splits;
        in.isa = GetParam();
        const AttentionPlan plan = plan_attention(in);
        split = split || !plan.reductions.empty();
        expect_same(batch.run(plan, *pool), wanted);
      }
    }
    EXPECT_TRUE(split);
  }
}

TEST_P(DifferentialBits, DoNotDependOnBlocksBeforeAWindow) {
  // The window begins inside of a piece.
  for (const Options& o : kinds()) {
    Batch batch(o, {{0, 560, 3}, {1, 700, 1}});
    batch.params.window_left = 100;
    const Rows wanted = batch.run(nullptr, GetParam());
    for (std::int64_t r = 0; r < 2; ++r)
      for (std::int64_t b = 0; b < (558 - 101) / 16; ++b)
        batch.block_table.view().select(0, r).as<std::int32_t>()[b] = -5;
    EXPECT_EQ(batch.run(nullptr, GetParam()), wanted);
    EXPECT_FALSE(has_nan(batch.result()));
    Batch alone(o, {{0, 558, 1}});
    alone.params.window_left = 100;
    expect_same(alone.run(nullptr, GetParam()), wanted);
  }
}

TEST_P(DifferentialBits, DoNotDependOnSharedPrefixes) {
  constexpr int kShared = 33;
  for (const Options& o : kinds()) {
    Batch batch(o, {{0, 540, 1}, {1, 700, 2}, {2, 600, 1}, {3, 9, 1}});
    for (std::int64_t r = 1; r < 3; ++r)
      std::memcpy(batch.block_table.view().select(0, r).data, batch.block_table.view().data,
                  kShared * sizeof(std::int32_t));
    AttentionPlanInput in = batch.plan_input(3);
    in.isa = GetParam();
    const auto pool = make_thread_pool(3);
    const Rows wanted = batch.run(plan_attention(in), *pool);
    const SharedPrefix prefixes[] = {{0, 3, kShared * 16}};
    in.shared_prefixes = prefixes;
    const AttentionPlan plan = plan_attention(in);
    EXPECT_FALSE(plan.reductions.empty());
    EXPECT_EQ(batch.run(plan, *pool), wanted);
  }
}

TEST_P(DifferentialBits, AreUntouchedByWhatIsMasked) {
  // NaN behind the diagonal: later keys of the same blocks, in both branches.
  for (const Options& o : kinds()) {
    if (is_fp8(o.cache)) continue;
    Batch batch(o, {{0, 40, 8}});
    const Rows wanted = batch.run(nullptr, GetParam());
    Batch spoilt(o, {{0, 40, 8}});
    // Position 39 is seen by the last query alone.
    const auto block = static_cast<std::int64_t>(get(spoilt.block_table, {0, 2}));
    const DifferentialAttentionArgs a = spoilt.args();
    for (const ConstTensorView& t : {a.k, a.v}) {
      for (std::int64_t branch = 0; branch < (o.is_v2() ? 1 : 2); ++branch) {
        const ConstTensorView rows = (o.is_v2() ? t : t.select(0, branch)).select(0, block);
        for (std::int64_t h = 0; h < rows.shape[1]; ++h)
          std::memset(const_cast<void*>(rows.select(0, 39 % 16).select(0, h).data), 0xff,
                      static_cast<std::size_t>(o.dim) * size_of(o.cache));
      }
    }
    Rows got = spoilt.run(nullptr, GetParam());
    EXPECT_TRUE(has_nan(spoilt.result()));  // the last row saw it
    got.erase({0, 39});
    expect_same(got, wanted);
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, DifferentialBits, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

}  // namespace
}  // namespace attend::testing
