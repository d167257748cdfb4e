// SPDX-License-Identifier: Apache-2.0
// Decodes that verify drafts: what the scheduler does with them, and that every row checks out.
#include <gmock/gmock.h>

#include <map>
#include <string>

#include "attend/core/error.h"
#include "serving/replay.h"
#include "serving/step.h"
#include "serving/synthetic.h"
#include "support/scale.h"

namespace attend::serving {
namespace {

Request request(std::int64_t id, std::int64_t prompt, std::int64_t output) {
  Request r;
  r.id = id;
  r.prompt_tokens = prompt;
  r.output_tokens = output;
  return r;
}

SchedulerConfig speculative(int drafts, double acceptance) {
  SchedulerConfig c;
  c.decode_threshold = 1 + drafts;
  c.num_speculative_tokens = drafts;
  c.acceptance = acceptance;
  c.seed = 4;
  return c;
}

/// Query tokens of each step of one request.
std::vector<int> steps_of(const SchedulerConfig& config, const Request& r,
                          SchedulerCounters* counters = nullptr) {
  BlockPool pool(20);
  Scheduler s(config, &pool);
  s.add(r);
  std::vector<int> steps;
  while (s.has_work()) {
    const RequestBatch& batch = s.schedule();
    steps.push_back(batch.num_tokens);
    const ScheduledRequest& only = batch.requests.at(0);
    EXPECT_LE(only.num_computed_tokens + only.num_scheduled_tokens, r.kv_tokens());
    EXPECT_EQ(only.is_decode(), steps.size() > 1);
    s.complete_step();
    EXPECT_EQ(pool.violation(), "");
  }
  EXPECT_EQ(s.counters().generated_tokens, r.output_tokens);
  EXPECT_EQ(s.counters().computed_tokens, r.kv_tokens());
  if (counters != nullptr) *counters = s.counters();
  return steps;
}

TEST(SpeculativeScheduler, AcceptingAllNeedsFewerSteps) {
  SchedulerCounters counters;
  // The prompt gives 1 token, then 4, 4 and the last one, which needs no draft.
  EXPECT_THAT(steps_of(speculative(3, 1.0), request(0, 30, 10), &counters),
              ::testing::ElementsAre(30, 4, 4, 1));
  EXPECT_EQ(counters.draft_tokens, 6);
  EXPECT_EQ(counters.accepted_tokens, 6);
}

TEST(SpeculativeScheduler, AcceptingNoneNeedsAsManyStepsAsWithout) {
  SchedulerCounters counters;
  EXPECT_THAT(steps_of(speculative(3, 0.0), request(0, 30, 6), &counters),
              ::testing::ElementsAre(30, 4, 4, 3, 2, 1));
  EXPECT_EQ(counters.draft_tokens, 3 + 3 + 2 + 1);
  EXPECT_EQ(counters.accepted_tokens, 0);
}

TEST(SpeculativeScheduler, ChanceOfAcceptanceIsTheGivenOne) {
  SchedulerCounters counters;
  std::int64_t first = 0, accepted = 0;
  for (int id = 0; id < 400; ++id) {
    steps_of(speculative(1, 0.6), request(id, 5, 50), &counters);
    first += counters.draft_tokens;
    accepted += counters.accepted_tokens;
  }
  // About 12000 drafts: five deviations are 0.022.
  EXPECT_NEAR(static_cast<double>(accepted) / static_cast<double>(first), 0.6, 0.025);
}

TEST(SpeculativeScheduler, DraftsFitTheBudget) {
  SchedulerConfig c = speculative(7, 0.5);
  c.max_num_batched_tokens = 3;
  for (const int tokens : steps_of(c, request(0, 3, 12))) EXPECT_LE(tokens, 3);
}

TEST(SpeculativeScheduler, RefusesBadSettings) {
  BlockPool pool(4);
  EXPECT_THROW(Scheduler(speculative(-1, 0.5), &pool), InvalidArgument);
  EXPECT_THROW(Scheduler(speculative(1, -0.1), &pool), InvalidArgument);
  EXPECT_THROW(Scheduler(speculative(1, 1.1), &pool), InvalidArgument);
}

TEST(SpeculativeStep, RejectedDraftsHoldOtherContent) {
  const Request r = request(1, 20, 30);
  const std::vector<std::int32_t> blocks = {5, 2};
  RequestBatch batch;
  batch.requests = {{&r, 20, 4, blocks, 3, 1}};
  batch.num_tokens = 4;
  EXPECT_EQ(batch.requests[0].first_rejected(), 22);
  EXPECT_TRUE(batch.requests[0].is_decode());
  const auto tokens = make_step_tokens(batch);
  const std::uint64_t own = own_content_id(r), draft = draft_content_id(r, 22);
  EXPECT_NE(own, draft);
  EXPECT_NE(draft, draft_content_id(r, 23));
  for (std::size_t t = 0; t < 4; ++t) {
    EXPECT_EQ(tokens[t].content, t < 2 ? own : draft);
    EXPECT_EQ(tokens[t].own_content, t < 2 ? own : draft);
    EXPECT_EQ(tokens[t].first_rejected, 22);
  }
  EXPECT_THAT(make_step_metadata(batch, 16).common.logits_indices,
              ::testing::ElementsAre(0, 1, 2, 3));
}

class SpeculativeReplay : public ::testing::Test {
 protected:
  SpeculativeReplay() {
    model_.name = "small";
    model_.num_q_heads = 4;
    model_.num_kv_heads = 2;
    model_.head_dim = 32;
    model_.num_layers = 4;
    config_.model = &model_;
    config_.max_num_batched_tokens = 64;
    config_.check_rows = 300;
    config_.num_layers = 2;
    config_.num_speculative_tokens = 4;
    config_.acceptance = 0.6;
  }
  Trace trace() const {
    const std::string requests = std::to_string(testing::scaled(10, 3));
    return make_synthetic(
        SyntheticConfig::parse("synthetic:requests=" + requests + ",prompt=50,output=40,shared=40"),
        5);
  }

  ModelPreset model_;
  ReplayConfig config_;
};

TEST_F(SpeculativeReplay, EveryRowChecksOut) {
  for (const std::optional<int> window : {std::optional<int>{}, std::optional<int>{7}}) {
    model_.sliding_window = window;
    const ReplayResult r = replay(trace(), config_);
    EXPECT_EQ(r.check.rows, 300);
    EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
    EXPECT_GT(r.counters.accepted_tokens, 0);
    EXPECT_LT(r.counters.accepted_tokens, r.counters.draft_tokens);
  }
}

TEST_F(SpeculativeReplay, SurvivesPreemption) {
  config_.num_blocks = 14;
  const ReplayResult r = replay(trace(), config_);
  EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
  EXPECT_GT(r.counters.preemptions, 0);
}

TEST_F(SpeculativeReplay, AStaleDraftIsCaught) {
  // The token that comes where a draft was rejected is not written: its slot keeps the draft.
  std::map<std::int64_t, int> written;
  int stale = 0;
  config_.acceptance = 0.0;
  config_.max_num_seqs = 1;
  config_.fault_injection = [&](CommonMetadata& m) {
    for (std::int64_t& slot : m.slot_mapping) {
      if (m.max_query_len <= 5 && written[slot]++ > 0) {
        slot = -1;
        ++stale;
      }
    }
  };
  EXPECT_GT(replay(trace(), config_).check.failed, 0);
  EXPECT_GT(stale, 0);
}

}  // namespace
}  // namespace attend::serving
