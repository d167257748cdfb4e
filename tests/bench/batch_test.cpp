// SPDX-License-Identifier: Apache-2.0
#include "bench/batch.h"

#include <gtest/gtest.h>

#include <set>
#include <utility>
#include <vector>

namespace attend::testing {
namespace {

using bench::Batch;
using bench::make_batch;
using bench::Request;

constexpr int kBlock = 4;
const std::vector<Request> kRequests{{1, 11}, {3, 9}, {5, 5}};

/// Pairs and visible keys of all requests, counted one by one.
std::pair<int, int> counted(int window_left) {
  int pairs = 0, keys = 0;
  for (const Request& r : kRequests) {
    std::set<int> seen;
    for (int position = r.seq_len - r.query_len; position < r.seq_len; ++position)
      for (int j = 0; j <= position; ++j) {
        if (window_left >= 0 && j < position - window_left) continue;
        ++pairs;
        seen.insert(j);
      }
    keys += static_cast<int>(seen.size());
  }
  return {pairs, keys};
}

TEST(BenchBatch, CountsWhatQueriesSee) {
  const Batch batch = make_batch(kRequests, kBlock);
  for (const int window_left : {-1, 0, 2, 7, 100}) {
    const auto [pairs, keys] = counted(window_left);
    EXPECT_EQ(batch.pairs(window_left, 0, 3), pairs) << window_left;
    EXPECT_EQ(batch.visible_keys(window_left, 0, 3), keys) << window_left;
  }
  EXPECT_EQ(batch.pairs(-1, 0, 1), 11);
  EXPECT_EQ(batch.visible_keys(-1, 1, 3), 14);
}

TEST(BenchBatch, KeysLieInBlocksOfTheirOwn) {
  const Batch batch = make_batch(kRequests, kBlock);
  EXPECT_EQ(batch.num_rows, (3 + 3 + 2) * kBlock);
  std::set<std::int64_t> rows;
  for (int r = 0; r < batch.num_reqs(); ++r)
    for (int j = 0; j < batch.seq_lens[static_cast<std::size_t>(r)]; ++j) {
      const std::int64_t row = batch.row(r, j);
      EXPECT_TRUE(rows.insert(row).second) << "two keys in row " << row;
      EXPECT_LT(row, batch.num_rows);
      EXPECT_EQ(row % kBlock, j % kBlock);
    }
}

TEST(BenchBatch, SharedKeysAreTheSameRows) {
  const Batch batch = make_batch(bench::requests(3, 1, 10), kBlock, 2 * kBlock);
  EXPECT_EQ(batch.num_rows, (2 + 3 * 1) * kBlock);
  for (int j = 0; j < 10; ++j) {
    EXPECT_EQ(batch.row(0, j) == batch.row(1, j), j < 2 * kBlock) << j;
    EXPECT_EQ(batch.row(1, j) == batch.row(2, j), j < 2 * kBlock) << j;
  }
}

TEST(BenchBatch, RaggedKeysFollowEachOther) {
  const Batch batch = make_batch(kRequests, 0);
  EXPECT_EQ(batch.num_rows, 25);
  EXPECT_EQ(batch.row(0, 0), 0);
  EXPECT_EQ(batch.row(1, 0), 11);
  EXPECT_EQ(batch.row(2, 4), 24);
}

TEST(BenchBatch, SamplesTheFirstAndTheLastRow) {
  const Batch batch = make_batch(kRequests, kBlock);
  const auto rows = bench::sample_rows(batch, 8);
  ASSERT_GT(rows.size(), 2U);
  EXPECT_EQ(rows[0].request, 0);
  EXPECT_EQ(rows[0].token, 0);
  EXPECT_EQ(rows[1].request, 2);
  EXPECT_EQ(rows[1].token, 4);
  for (const bench::Row& row : rows) {
    EXPECT_LT(row.token, batch.query_len(row.request));
    EXPECT_LT(row.head, 8);
  }
}

}  // namespace
}  // namespace attend::testing
