// SPDX-License-Identifier: Apache-2.0
#include "bench/tune.h"

#include <gmock/gmock.h>

#include <algorithm>

namespace attend::bench {
namespace {

using ::testing::Contains;
using ::testing::Not;

constexpr IsaLevel kLow = IsaLevel::avx2, kHigh = IsaLevel::avx512;

IsaLevel choose(double low_prefill, double low_decode, double high_prefill, double high_decode) {
  const std::vector<LevelTimes> levels = {{kLow, low_prefill, low_decode},
                                          {kHigh, high_prefill, high_decode}};
  return choose_level(levels);
}

TEST(ChooseLevel, HighestUnlessALowerOneIsClearlyFaster) {
  EXPECT_EQ(choose(2, 2, 1, 1), kHigh);
  EXPECT_EQ(choose(1, 1, 1, 1), kHigh);
  EXPECT_EQ(choose(0.96, 0.96, 1, 1), kHigh);
  EXPECT_EQ(choose(0.94, 0.94, 1, 1), kLow);
  EXPECT_EQ(choose(0.5, 1, 1, 1), kLow);
  EXPECT_EQ(choose(0.5, 2.1, 1, 1), kHigh);  // both kinds of work count
}

TEST(ChooseLevel, FastestOfSeveral) {
  const std::vector<LevelTimes> levels = {
      {IsaLevel::avx2, 0.8, 1}, {IsaLevel::avx512, 0.7, 1}, {IsaLevel::amx, 1, 1}};
  EXPECT_EQ(choose_level(levels), IsaLevel::avx512);
  EXPECT_EQ(choose_level(std::span(levels).first(1)), IsaLevel::avx2);
}

TEST(DistinctLevels, AreAvailableAndAscend) {
  for (const KernelKind kind : kKernelKinds) {
    const auto levels = distinct_levels(kind);
    ASSERT_FALSE(levels.empty());
    EXPECT_TRUE(std::ranges::is_sorted(levels, std::ranges::less_equal()));
    EXPECT_LE(levels.back(), available_isa_levels().back());
    if (available_isa_levels().back() > IsaLevel::scalar) {
      EXPECT_THAT(levels, Not(Contains(IsaLevel::scalar)));
    }
  }
}

TEST(Tune, MeasuresEveryKindAndChoosesOneOfItsLevels) {
  const auto pool = make_thread_pool(1);
  const Tuning tuning = tune(*pool, {.prefill_tokens = 16, .decode_keys = 32, .rounds = 1});
  ASSERT_EQ(tuning.kinds.size(), kNumKernelKinds);
  for (const KernelKind kind : kKernelKinds) {
    const KindTimes& times = tuning.kinds[static_cast<std::size_t>(kind)];
    EXPECT_EQ(times.kind, kind);
    std::vector<IsaLevel> measured;
    for (const LevelTimes& t : times.levels) {
      measured.push_back(t.isa);
      EXPECT_GT(t.prefill_seconds, 0.0);
      EXPECT_LT(t.decode_seconds, 1e9);
    }
    EXPECT_EQ(measured, distinct_levels(kind));
    EXPECT_THAT(measured, Contains(times.chosen));
    EXPECT_EQ(tuning.levels()[static_cast<std::size_t>(kind)], times.chosen);
  }
}

}  // namespace
}  // namespace attend::bench
