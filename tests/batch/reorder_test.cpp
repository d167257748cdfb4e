// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "attend/batch/split.h"
#include "attend/core/error.h"
#include "support/random.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Pair;

constexpr ReorderRequest kDecode{1, 50, 20};
constexpr ReorderRequest kShortExtend{1, 10, 20};
constexpr ReorderRequest kLongExtend{8, 10, 20};
constexpr ReorderRequest kPrefill{8, 0, 20};

// Region by the definition, for a threshold of 1.
int region_of(const ReorderRequest& r) {
  if (r.num_computed_tokens == 0) return 3;
  if (r.num_scheduled_tokens > 1) return 2;
  return r.num_computed_tokens < r.num_prompt_tokens ? 1 : 0;
}

std::vector<int> order_after(const std::vector<ReorderRequest>& requests) {
  std::vector<int> order(requests.size());
  std::iota(order.begin(), order.end(), 0);
  for (const auto& [a, b] : reorder_swaps(requests)) {
    std::swap(order[static_cast<std::size_t>(a)], order[static_cast<std::size_t>(b)]);
  }
  return order;
}

TEST(ReorderTest, NothingMovesInAnOrderedBatch) {
  const std::vector requests = {kDecode, kDecode, kShortExtend, kLongExtend, kPrefill};
  EXPECT_THAT(reorder_swaps(requests), IsEmpty());
  EXPECT_THAT(reorder_swaps({}), IsEmpty());
}

TEST(ReorderTest, OneSwapForOnePair) {
  const std::vector requests = {kPrefill, kShortExtend, kDecode};
  EXPECT_THAT(reorder_swaps(requests), ElementsAre(Pair(0, 2)));
}

TEST(ReorderTest, SortsAllFourRegions) {
  EXPECT_THAT(order_after({kPrefill, kLongExtend, kShortExtend, kDecode}), ElementsAre(3, 2, 1, 0));
}

TEST(ReorderTest, MisplacedRowsOfARegionKeepTheirOrder) {
  EXPECT_THAT(order_after({kPrefill, kPrefill, kDecode, kDecode}), ElementsAre(2, 3, 0, 1));
}

TEST(ReorderTest, AFirstTokenOfAPromptIsAPrefillHoweverShort) {
  EXPECT_THAT(order_after({{1, 0, 1}, kDecode}), ElementsAre(1, 0));
}

TEST(ReorderTest, TheThresholdIsInclusive) {
  const std::vector<ReorderRequest> requests = {{5, 50, 20}, {4, 50, 20}};
  EXPECT_THAT(reorder_swaps(requests, 4), ElementsAre(Pair(0, 1)));
  EXPECT_THAT(reorder_swaps(requests, 5), IsEmpty());
  EXPECT_THROW(reorder_swaps(requests, 0), InvalidArgument);
}

TEST(ReorderTest, RandomBatches) {
  testing::Rng rng(3);
  SCOPED_TRACE(rng.trace());
  const std::vector kinds = {kDecode, kShortExtend, kLongExtend, kPrefill};
  for (int round = 0; round < 2000; ++round) {
    std::vector<ReorderRequest> requests(static_cast<std::size_t>(rng.integer(0, 12)));
    for (auto& r : requests) r = rng.pick(kinds);
    std::vector<int> target(requests.size());
    std::ranges::transform(requests, target.begin(), region_of);
    std::ranges::sort(target);

    const std::vector<int> order = order_after(requests);
    std::size_t misplaced = 0;
    for (std::size_t i = 0; i < order.size(); ++i) {
      ASSERT_EQ(region_of(requests[static_cast<std::size_t>(order[i])]), target[i]);
      if (region_of(requests[i]) == target[i]) {
        ASSERT_EQ(order[i], static_cast<int>(i)) << "a row in its region moved";
      } else {
        ++misplaced;
      }
    }
    ASSERT_LE(reorder_swaps(requests).size(), misplaced == 0 ? 0 : misplaced - 1);
  }
}

}  // namespace
}  // namespace attend
