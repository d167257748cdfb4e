// SPDX-License-Identifier: Apache-2.0
// Random workloads through scheduler and block pool against a model of the cache that remembers
// which token stands in which slot.
#include <gmock/gmock.h>

#include <map>
#include <set>
#include <tuple>

#include "serving/content.h"
#include "serving/scheduler.h"
#include "support/random.h"
#include "support/scale.h"

namespace attend::serving {
namespace {

struct Workload {
  SchedulerConfig config;
  std::int64_t num_blocks = 0;
  std::vector<Request> requests;
};

Workload random_workload(testing::Rng& rng) {
  Workload w;
  w.config.max_num_batched_tokens = static_cast<int>(rng.integer(1, 100));
  w.config.max_num_seqs = static_cast<int>(rng.integer(1, 12));
  w.config.block_size = rng.pick(std::vector{1, 4, 16});
  const std::int64_t num_requests = rng.integer(1, 30);
  std::int64_t largest = 0;
  for (std::int64_t i = 0; i < num_requests; ++i) {
    Request r;
    r.id = i;
    r.prompt_tokens = rng.integer(1, 120);
    r.output_tokens = rng.integer(0, 40);
    for (std::int64_t end = 0; end < r.prompt_tokens && rng.chance(0.8);) {
      end = std::min(end + 20, r.prompt_tokens);
      // Like a trace's hash ids: an id says where it stands, and few enough that many are shared.
      r.segments.push_back({static_cast<std::uint64_t>(end * 2 + rng.integer(0, 1)), end});
    }
    largest = std::max(largest, ceil_div(r.kv_tokens(), w.config.block_size));
    w.requests.push_back(std::move(r));
  }
  w.num_blocks = largest + rng.integer(0, 2 * largest);
  return w;
}

using Token = std::pair<std::uint64_t, std::int64_t>;  // content, position

/// What a step did, to compare two runs.
using StepTrace = std::vector<std::tuple<std::int64_t, std::int64_t, int, std::int32_t>>;

class Simulation {
 public:
  explicit Simulation(const Workload& w)
      : w_(w), pool_(w.num_blocks), scheduler_(w.config, &pool_) {
    for (const Request& r : w.requests) scheduler_.add(r);
  }

  std::vector<StepTrace> run() {
    std::vector<StepTrace> steps;
    while (scheduler_.has_work()) {
      steps.push_back(step());
      if (::testing::Test::HasFatalFailure() || ::testing::Test::HasFailure()) break;
      if (steps.size() > 100000) ADD_FAILURE() << "no progress";
    }
    return steps;
  }
  const SchedulerCounters& counters() const { return scheduler_.counters(); }
  const BlockPool& pool() const { return pool_; }
  std::int64_t computed(std::int64_t request) { return computed_[request]; }

 private:
  StepTrace step() {
    const auto preemptions = scheduler_.counters().preemptions;
    const RequestBatch& batch = scheduler_.schedule();
    const bool preempted = scheduler_.counters().preemptions != preemptions;
    EXPECT_FALSE(batch.requests.empty());
    EXPECT_LE(batch.num_tokens, w_.config.max_num_batched_tokens);
    EXPECT_LE(static_cast<int>(batch.requests.size()), w_.config.max_num_seqs);
    StepTrace trace;
    std::set<std::int64_t> written;
    int tokens = 0;
    bool prefill_seen = false;
    for (const ScheduledRequest& r : batch.requests) {
      tokens += r.num_scheduled_tokens;
      EXPECT_FALSE(r.is_decode() && prefill_seen) << "decodes come first";
      prefill_seen |= !r.is_decode();
      check_continuity(r, preempted);
      write(r, written);
      trace.emplace_back(r.request->id, r.num_computed_tokens, r.num_scheduled_tokens,
                         r.blocks.back());
    }
    EXPECT_EQ(tokens, batch.num_tokens);
    for (const ScheduledRequest& r : batch.requests) read(r);
    EXPECT_EQ(pool_.violation(), "");
    scheduler_.complete_step();
    EXPECT_EQ(pool_.violation(), "");
    return trace;
  }

  /// A request goes on where it stopped, unless it was preempted or begins with a prefix hit.
  void check_continuity(const ScheduledRequest& r, bool) {
    auto& done = computed_[r.request->id];
    EXPECT_GE(r.num_scheduled_tokens, 1);
    if (r.num_computed_tokens != done) {
      EXPECT_EQ(r.num_computed_tokens % w_.config.block_size, 0) << "hits are whole blocks";
      if (done > 0) ++restarts_;
      EXPECT_LE(restarts_, scheduler_.counters().preemptions);
    }
    done = r.num_computed_tokens + r.num_scheduled_tokens;
    EXPECT_LE(done, r.request->kv_tokens());
    EXPECT_EQ(static_cast<std::int64_t>(r.blocks.size()), ceil_div(done, w_.config.block_size));
  }

  std::int64_t slot(const ScheduledRequest& r, std::int64_t p) const {
    const auto block = r.blocks[static_cast<std::size_t>(p / w_.config.block_size)];
    return block * std::int64_t{w_.config.block_size} + p % w_.config.block_size;
  }

  void write(const ScheduledRequest& r, std::set<std::int64_t>& written) {
    for (int i = 0; i < r.num_scheduled_tokens; ++i) {
      const std::int64_t p = r.num_computed_tokens + i;
      EXPECT_TRUE(written.insert(slot(r, p)).second) << "two requests write slot " << slot(r, p);
      cache_[slot(r, p)] = {content_id(*r.request, p), p};
    }
  }

  void read(const ScheduledRequest& r) {
    for (std::int64_t p = 0; p < r.num_computed_tokens + r.num_scheduled_tokens; ++p) {
      ASSERT_EQ(cache_[slot(r, p)], (Token{content_id(*r.request, p), p}))
          << "request " << r.request->id << " position " << p;
    }
  }

  const Workload& w_;
  BlockPool pool_;
  Scheduler scheduler_;
  std::map<std::int64_t, Token> cache_;
  std::map<std::int64_t, std::int64_t> computed_;
  std::int64_t restarts_ = 0;
};

TEST(SchedulerProperty, EveryStepReadsTheRightTokensAndEverythingIsDoneOnce) {
  testing::Rng rng(11);
  SCOPED_TRACE(rng.trace());
  std::int64_t preemptions = 0, hits = 0;
  for (int i = 0; i < test::scaled(300, 40); ++i) {
    SCOPED_TRACE("workload " + std::to_string(i));
    const Workload w = random_workload(rng);
    Simulation simulation(w);
    simulation.run();
    ASSERT_FALSE(HasFailure());
    std::int64_t generated = 0, kv_tokens = 0;
    for (const Request& r : w.requests) {
      generated += r.output_tokens;
      kv_tokens += r.kv_tokens();
      EXPECT_EQ(simulation.computed(r.id), r.kv_tokens());
    }
    const SchedulerCounters& c = simulation.counters();
    EXPECT_EQ(c.generated_tokens, generated);
    EXPECT_EQ(c.finished_requests, static_cast<std::int64_t>(w.requests.size()));
    if (c.preemptions == 0) {
      EXPECT_EQ(c.computed_tokens + c.prefix_hit_tokens, kv_tokens);
    }
    EXPECT_EQ(simulation.pool().num_used(), 0);
    preemptions += c.preemptions;
    hits += c.prefix_hit_tokens;
  }
  EXPECT_GT(preemptions, 0) << "the workloads must exercise preemption";
  EXPECT_GT(hits, 0) << "and prefix reuse";
}

TEST(SchedulerProperty, SchedulingIsDeterministic) {
  testing::Rng rng(12);
  SCOPED_TRACE(rng.trace());
  for (int i = 0; i < test::scaled(50, 10); ++i) {
    const Workload w = random_workload(rng);
    EXPECT_EQ(Simulation(w).run(), Simulation(w).run());
  }
}

}  // namespace
}  // namespace attend::serving
