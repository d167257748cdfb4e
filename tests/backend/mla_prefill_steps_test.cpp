// SPDX-License-Identifier: Apache-2.0
// Chunks of contexts: every key once and in order, in the piece where one call would have it.
#include "backends/mla/prefill_steps.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "support/random.h"

namespace attend::mla {
namespace {

using ::testing::ElementsAre;

struct Batch {
  std::vector<std::int32_t> query_start_loc{0}, seq_lens;
  Batch& add(int context, int query) {
    query_start_loc.push_back(query_start_loc.back() + query);
    seq_lens.push_back(context + query);
    return *this;
  }
  int context(std::size_t r) const {
    return seq_lens[r] - (query_start_loc[r + 1] - query_start_loc[r]);
  }
  /// Of the requests from `begin` on.
  std::vector<PrefillStep> cut(std::int64_t max_keys, int begin = 0) const {
    return cut_prefill({begin, static_cast<int>(seq_lens.size()), query_start_loc, seq_lens},
                       max_keys);
  }
};

void expect_in_order(const Batch& batch, std::int64_t max_keys, int begin) {
  std::vector<std::int32_t> done(batch.seq_lens.size(), 0);
  std::vector<int> ends(batch.seq_lens.size(), 0);
  bool finishing = false;
  for (const PrefillStep& step : batch.cut(max_keys, begin)) {
    const auto count = static_cast<std::size_t>(step.request_end - step.request_begin);
    ASSERT_GE(step.request_begin, begin);
    ASSERT_GT(count, 0U);
    ASSERT_EQ(step.starts.size(), count);
    ASSERT_EQ(step.resumes.size(), count);
    ASSERT_EQ(step.cu_seq_lens.size(), count + 1);
    ASSERT_EQ(step.cu_seq_lens[0], 0);
    ASSERT_EQ(step.token_begin,
              batch.query_start_loc[static_cast<std::size_t>(step.request_begin)]);
    ASSERT_TRUE(step.last || !finishing);  // chunks come first
    finishing = step.last;
    // Beyond the capacity lies only one request's rest.
    if (step.num_keys() > max_keys) {
      ASSERT_TRUE(step.last);
      ASSERT_EQ(count, 1U);
    }
    for (std::size_t i = 0; i < count; ++i) {
      const auto r = static_cast<std::size_t>(step.request_begin) + i;
      const std::int32_t keys = step.cu_seq_lens[i + 1] - step.cu_seq_lens[i];
      ASSERT_EQ(step.starts[i], done[r]);
      ASSERT_EQ(step.starts[i] % kPieceSize, 0);
      ASSERT_EQ(step.resumes[i] != 0, done[r] > 0);
      done[r] += keys;
      if (step.last) {
        ++ends[r];
      } else {
        ASSERT_GT(keys, 0);
        ASSERT_LE(done[r], batch.context(r));  // whole pieces without new tokens
        ASSERT_EQ(keys % kPieceSize, 0);
      }
    }
  }
  for (std::size_t r = 0; r < done.size(); ++r) {
    const bool wanted = static_cast<int>(r) >= begin;
    const bool asks = batch.query_start_loc[r + 1] > batch.query_start_loc[r];
    ASSERT_EQ(done[r], wanted && asks ? batch.seq_lens[r] : 0) << r;
    ASSERT_EQ(ends[r], wanted ? 1 : 0) << r;
  }
}

TEST(MlaPrefillSteps, HaveEveryKeyOnceAndInOrder) {
  testing::Rng rng(29);
  SCOPED_TRACE(rng.trace());
  for (int i = 0; i < 3000; ++i) {
    Batch batch;
    const auto num_reqs = static_cast<int>(rng.integer(1, 9));
    for (int r = 0; r < num_reqs; ++r) {
      const std::int64_t longest = rng.pick(std::vector{1, 255, 256, 1000, 20000});
      batch.add(
          rng.chance(0.3) ? 0 : static_cast<int>(rng.integer(1, longest)),
          static_cast<int>(rng.integer(rng.chance(0.1) ? 0 : 1, rng.chance(0.2) ? 3000 : 40)));
    }
    const auto begin = static_cast<int>(rng.integer(0, num_reqs));
    const std::int64_t max_keys = rng.pick(std::vector{256, 300, 511, 512, 1024, 4096});
    ASSERT_NO_FATAL_FAILURE(expect_in_order(batch, max_keys, begin)) << i;
  }
}

TEST(MlaPrefillSteps, OfRequestsWithoutContextAreOne) {
  const auto steps = Batch().add(0, 10).add(0, 300).add(255, 5).cut(4096);
  ASSERT_EQ(steps.size(), 1U);
  EXPECT_TRUE(steps[0].last);
  EXPECT_THAT(steps[0].cu_seq_lens, ElementsAre(0, 10, 310, 570));
  EXPECT_THAT(steps[0].starts, ElementsAre(0, 0, 0));
  EXPECT_THAT(steps[0].resumes, ElementsAre(0, 0, 0));
}

TEST(MlaPrefillSteps, FillTheirRoomWithWholePieces) {
  const auto steps = Batch().add(600, 4).add(1100, 4).add(300, 4).cut(1024);
  ASSERT_EQ(steps.size(), 3U);
  // 512 of the first and 512 of the second; 512 of the second and 256 of the third.
  EXPECT_THAT(steps[0].starts, ElementsAre(0, 0));
  EXPECT_THAT(steps[0].cu_seq_lens, ElementsAre(0, 512, 1024));
  EXPECT_EQ(steps[1].request_begin, 1);
  EXPECT_EQ(steps[1].token_begin, 4);
  EXPECT_THAT(steps[1].starts, ElementsAre(512, 0));
  EXPECT_THAT(steps[1].resumes, ElementsAre(1, 0));
  EXPECT_THAT(steps[1].cu_seq_lens, ElementsAre(0, 512, 768));
  EXPECT_THAT(steps[2].starts, ElementsAre(512, 1024, 256));
  EXPECT_THAT(steps[2].resumes, ElementsAre(1, 1, 1));
}

TEST(MlaPrefillSteps, StandBesideEachOther) {
  // The one in the middle has no whole piece of context: chunks do not reach over it.
  const auto steps = Batch().add(256, 4).add(10, 4).add(256, 4).cut(4096);
  ASSERT_EQ(steps.size(), 3U);
  EXPECT_EQ(steps[0].request_end, 1);
  EXPECT_EQ(steps[1].request_begin, 2);
  EXPECT_EQ(steps[2].request_end - steps[2].request_begin, 3);
}

TEST(MlaPrefillSteps, OfNoRequestsAreNone) { EXPECT_TRUE(Batch().add(5, 5).cut(256, 1).empty()); }

}  // namespace
}  // namespace attend::mla
