// SPDX-License-Identifier: Apache-2.0
#include "serving/block_pool.h"

#include <gmock/gmock.h>

#include <map>

#include "attend/core/error.h"
#include "support/random.h"

namespace attend::serving {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<std::int32_t> allocate(BlockPool& pool, int count) {
  std::vector<std::int32_t> blocks;
  for (int i = 0; i < count; ++i) blocks.push_back(pool.allocate().value());
  return blocks;
}

TEST(BlockPool, HandsOutEveryBlockOnceThenNone) {
  BlockPool pool(3);
  EXPECT_THAT(allocate(pool, 3), ::testing::UnorderedElementsAre(0, 1, 2));
  EXPECT_FALSE(pool.allocate().has_value());
  EXPECT_EQ(pool.num_free(), 0);
  EXPECT_EQ(pool.peak_used(), 3);
  EXPECT_EQ(pool.violation(), "");
}

TEST(BlockPool, FindsTheLongestPublishedPrefix) {
  BlockPool pool(4);
  const auto blocks = allocate(pool, 3);
  pool.publish(blocks[0], 10);
  pool.publish(blocks[1], 11);
  EXPECT_THAT(pool.find_prefix(std::vector<std::uint64_t>{10, 11, 12}),
              ElementsAre(blocks[0], blocks[1]));
  EXPECT_THAT(pool.find_prefix(std::vector<std::uint64_t>{11, 10}),
              ElementsAre(blocks[1], blocks[0]));
  EXPECT_THAT(pool.find_prefix(std::vector<std::uint64_t>{9, 10, 11}), IsEmpty());
}

TEST(BlockPool, KeepsReleasedBlocksUntilTheirRoomIsNeeded) {
  BlockPool pool(2);
  const auto blocks = allocate(pool, 2);
  pool.publish(blocks[0], 10);
  pool.release(blocks);
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_THAT(pool.find_prefix(std::vector<std::uint64_t>{10}), ElementsAre(blocks[0]));
  // The block without content goes first, the cached one only when nothing else is left.
  EXPECT_EQ(pool.allocate(), blocks[1]);
  EXPECT_TRUE(pool.is_cached(blocks[0]));
  EXPECT_EQ(pool.allocate(), blocks[0]);
  EXPECT_FALSE(pool.is_cached(blocks[0]));
  EXPECT_THAT(pool.find_prefix(std::vector<std::uint64_t>{10}), IsEmpty());
  EXPECT_EQ(pool.violation(), "");
}

TEST(BlockPool, EvictsLeastRecentlyUsedFirstAndDeepestFirst) {
  BlockPool pool(5);
  const auto first = allocate(pool, 3), second = allocate(pool, 2);
  for (int i = 0; i < 3; ++i) pool.publish(first[i], 100 + i);
  for (int i = 0; i < 2; ++i) pool.publish(second[i], 200 + i);
  pool.release(first);
  pool.release(second);
  EXPECT_THAT(allocate(pool, 5), ElementsAre(first[2], first[1], first[0], second[1], second[0]));
}

TEST(BlockPool, AHitMakesABlockRecentlyUsed) {
  BlockPool pool(2);
  const auto blocks = allocate(pool, 2);
  pool.publish(blocks[0], 10);
  pool.publish(blocks[1], 20);
  pool.release(std::vector{blocks[0]});
  pool.release(std::vector{blocks[1]});
  pool.share(blocks[0]);
  EXPECT_EQ(pool.num_used(), 1);
  pool.release(std::vector{blocks[0]});
  EXPECT_EQ(pool.allocate(), blocks[1]);
}

TEST(BlockPool, SharedBlocksLiveUntilTheLastReferenceGoes) {
  BlockPool pool(1);
  const auto blocks = allocate(pool, 1);
  pool.publish(blocks[0], 10);
  pool.share(blocks[0]);
  EXPECT_EQ(pool.references(blocks[0]), 2);
  pool.release(blocks);
  EXPECT_FALSE(pool.allocate().has_value());
  pool.release(blocks);
  EXPECT_TRUE(pool.allocate().has_value());
}

TEST(BlockPool, TheFirstBlockPublishedUnderAHashStays) {
  BlockPool pool(2);
  const auto blocks = allocate(pool, 2);
  pool.publish(blocks[0], 10);
  pool.publish(blocks[1], 10);
  EXPECT_THAT(pool.find_prefix(std::vector<std::uint64_t>{10}), ElementsAre(blocks[0]));
  EXPECT_FALSE(pool.is_cached(blocks[1]));
  EXPECT_EQ(pool.violation(), "");
}

TEST(BlockPool, RefusesMisuse) {
  EXPECT_THROW(BlockPool(0), InvalidArgument);
  EXPECT_THROW(BlockPool(std::int64_t{1} << 31), InvalidArgument);
  BlockPool pool(2);
  EXPECT_THROW(pool.share(0), InvalidArgument);
  EXPECT_THROW(pool.share(2), InvalidArgument);
  EXPECT_THROW(pool.share(-1), InvalidArgument);
  EXPECT_THROW(pool.publish(0, 1), InvalidArgument);
  EXPECT_THROW(pool.release(std::vector{0}), InvalidArgument);
  EXPECT_EQ(pool.violation(), "");
}

// Random use against a plain model of what must hold: reference counts and who is findable.
TEST(BlockPool, KeepsItsInvariantsUnderRandomUse) {
  testing::Rng rng(7);
  SCOPED_TRACE(rng.trace());
  BlockPool pool(12);
  std::vector<std::int32_t> held;  // one entry a reference
  for (int i = 0; i < 20000; ++i) {
    const auto action = rng.integer(0, 4);
    if (action <= 1) {
      const bool full = pool.num_free() == 0;
      const auto block = pool.allocate();
      ASSERT_EQ(block.has_value(), !full);
      if (block) held.push_back(*block);
    } else if (action == 2 && !held.empty()) {
      pool.publish(rng.pick(held), static_cast<std::uint64_t>(rng.integer(0, 30)));
    } else if (action == 3) {
      const std::uint64_t hash[] = {static_cast<std::uint64_t>(rng.integer(0, 30))};
      for (const auto block : pool.find_prefix(hash)) {
        pool.share(block);
        held.push_back(block);
      }
    } else if (!held.empty()) {
      const auto at = held.begin() + rng.integer(0, static_cast<std::int64_t>(held.size()) - 1);
      pool.release(std::vector{*at});
      held.erase(at);
    }
    std::map<std::int32_t, int> counts;
    for (const auto block : held) ++counts[block];
    for (std::int32_t b = 0; b < 12; ++b) ASSERT_EQ(pool.references(b), counts[b]);
    ASSERT_EQ(pool.violation(), "");
  }
}

}  // namespace
}  // namespace attend::serving
