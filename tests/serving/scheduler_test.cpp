// SPDX-License-Identifier: Apache-2.0
#include "serving/scheduler.h"

#include <gmock/gmock.h>

#include "attend/core/error.h"

namespace attend::serving {
namespace {

using ::testing::HasSubstr;

Request request(std::int64_t id, std::int64_t prompt, std::int64_t output,
                std::vector<ContentSegment> segments = {}) {
  Request r;
  r.id = id;
  r.prompt_tokens = prompt;
  r.output_tokens = output;
  r.segments = std::move(segments);
  return r;
}

TEST(Scheduler, CutsPromptsToTheBudgetAndRunsDecodesFirst) {
  BlockPool pool(100);
  Scheduler s({.max_num_batched_tokens = 32, .block_size = 16}, &pool);
  const Request a = request(0, 30, 3), b = request(1, 50, 1);
  s.add(a);
  s.add(b);

  const RequestBatch& first = s.schedule();
  ASSERT_EQ(first.requests.size(), 2U);
  EXPECT_EQ(first.requests[0].num_scheduled_tokens, 30);
  EXPECT_EQ(first.requests[1].num_scheduled_tokens, 2);
  s.complete_step();

  const RequestBatch& second = s.schedule();
  ASSERT_EQ(second.requests.size(), 2U);
  EXPECT_EQ(second.requests[0].request, &a);
  EXPECT_TRUE(second.requests[0].is_decode());
  EXPECT_EQ(second.requests[0].num_computed_tokens, 30);
  EXPECT_EQ(second.requests[1].num_computed_tokens, 2);
  EXPECT_EQ(second.requests[1].num_scheduled_tokens, 31);
  EXPECT_EQ(second.requests[1].blocks.size(), 3U) << "33 tokens in blocks of 16";
  EXPECT_EQ(second.num_tokens, 32);
}

TEST(Scheduler, GeneratesExactlyTheOutputTokens) {
  BlockPool pool(10);
  Scheduler s({.max_num_batched_tokens = 64, .block_size = 16}, &pool);
  const Request a = request(0, 5, 4), prompt_only = request(1, 5, 0);
  s.add(a);
  s.add(prompt_only);
  int steps = 0;
  for (; s.has_work(); ++steps) {
    s.schedule();
    s.complete_step();
  }
  EXPECT_EQ(steps, 4) << "the prompt gives the first token";
  EXPECT_EQ(s.counters().generated_tokens, 4);
  EXPECT_EQ(s.counters().computed_tokens, 5 + 3 + 5);
  EXPECT_EQ(s.counters().finished_requests, 2);
  EXPECT_EQ(pool.num_used(), 0);
}

TEST(Scheduler, ReusesAPrefixButComputesTheLastToken) {
  BlockPool pool(10);
  Scheduler s({.max_num_batched_tokens = 64, .block_size = 16}, &pool);
  const Request a = request(0, 32, 1, {{7, 32}}), b = request(1, 32, 1, {{7, 32}}),
                c = request(2, 40, 1, {{7, 32}});
  s.add(a);
  s.schedule();
  s.complete_step();
  s.add(b);
  s.add(c);
  const RequestBatch& batch = s.schedule();
  ASSERT_EQ(batch.requests.size(), 2U);
  for (const ScheduledRequest& r : batch.requests) {
    // All of b is in the cache, but its last block must be computed for the token after it.
    EXPECT_EQ(r.num_computed_tokens, r.request == &b ? 16 : 32);
    EXPECT_EQ(r.num_scheduled_tokens, r.request == &b ? 16 : 8);
  }
  EXPECT_EQ(batch.requests[0].blocks[0], batch.requests[1].blocks[0]);
  EXPECT_EQ(s.counters().prefix_hit_tokens, 16 + 32);
}

TEST(Scheduler, PreemptsTheLatestAndRecomputesIt) {
  BlockPool pool(4);
  Scheduler s({.max_num_batched_tokens = 64, .block_size = 16}, &pool);
  const Request a = request(0, 32, 20), b = request(1, 32, 20);
  s.add(a);
  s.add(b);
  s.schedule();
  s.complete_step();
  EXPECT_EQ(pool.num_free(), 0);

  const RequestBatch& batch = s.schedule();  // a needs a third block, b loses its two
  ASSERT_EQ(batch.requests.size(), 1U);
  EXPECT_EQ(batch.requests[0].request, &a);
  EXPECT_EQ(s.counters().preemptions, 1);
  EXPECT_EQ(s.num_waiting(), 1U);
  s.complete_step();
  while (s.has_work()) {
    s.schedule();
    s.complete_step();
  }
  EXPECT_EQ(s.counters().generated_tokens, 40);
  EXPECT_EQ(s.counters().prefix_hit_tokens, 0) << "its own blocks are no prefix hit";
  EXPECT_EQ(pool.num_used(), 0);
}

TEST(Scheduler, ObeysMaxNumSeqs) {
  BlockPool pool(100);
  Scheduler s({.max_num_seqs = 2}, &pool);
  const Request a = request(0, 5, 2), b = request(1, 5, 2), c = request(2, 5, 2);
  for (const Request* r : {&a, &b, &c}) s.add(*r);
  EXPECT_EQ(s.schedule().requests.size(), 2U);
}

TEST(Scheduler, ARequestLargerThanTheCacheNamesBothSizes) {
  BlockPool pool(4);
  Scheduler s({.block_size = 16}, &pool);
  EXPECT_NO_THROW(s.require_fits(request(0, 60, 5))) << "the last token is never stored";
  try {
    s.add(request(9, 60, 6));
    FAIL();
  } catch (const OutOfBlocks& e) {
    EXPECT_EQ(e.needed(), 5);
    EXPECT_EQ(e.capacity(), 4);
    EXPECT_THAT(e.what(), HasSubstr("request 9 (65 tokens, the whole cache holds 64)"));
  }
  EXPECT_FALSE(s.has_work());
}

TEST(Scheduler, EncodersRunWholePromptsWithoutBlocks) {
  Scheduler s({.max_num_batched_tokens = 100}, nullptr);
  const Request a = request(0, 60, 5), b = request(1, 50, 5), c = request(2, 300, 5);
  for (const Request* r : {&a, &b, &c}) s.add(*r);
  std::vector<int> tokens;
  while (s.has_work()) {
    const RequestBatch& batch = s.schedule();
    EXPECT_EQ(batch.requests.size(), 1U);
    EXPECT_TRUE(batch.requests[0].blocks.empty());
    tokens.push_back(batch.num_tokens);
    s.complete_step();
  }
  EXPECT_EQ(tokens, (std::vector{60, 50, 300})) << "a prompt over the budget runs alone";
  EXPECT_EQ(s.counters().generated_tokens, 0);
}

TEST(Scheduler, RefusesBadSettings) {
  BlockPool pool(4);
  EXPECT_THROW(Scheduler({.max_num_batched_tokens = 0}, &pool), InvalidArgument);
  EXPECT_THROW(Scheduler({.max_num_seqs = 0}, &pool), InvalidArgument);
  EXPECT_THROW(Scheduler({.block_size = 0}, &pool), InvalidArgument);
  EXPECT_THROW(Scheduler({.decode_threshold = 0}, &pool), InvalidArgument);
}

}  // namespace
}  // namespace attend::serving
