// SPDX-License-Identifier: Apache-2.0
// Requests with an encoder: scheduling with a block pool for its keys, and the whole replay.
#include <gmock/gmock.h>

#include <algorithm>
#include <set>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "serving/layer_group.h"
#include "serving/replay.h"
#include "serving/scheduler.h"
#include "serving/synthetic.h"
#include "support/random.h"
#include "support/scale.h"

namespace attend::serving {
namespace {

using ::testing::ElementsAre;

ModelPreset small_whisper() {
  ModelPreset m;
  m.name = "small";
  m.num_q_heads = 4;
  m.num_kv_heads = 4;
  m.head_dim = 16;
  m.num_layers = 2;
  m.encoder_tokens = 45;  // three blocks, the last one not full
  return m;
}

Trace small_trace(int requests = 12) {
  return make_synthetic(SyntheticConfig::parse("synthetic:requests=" + std::to_string(requests) +
                                               ",prompt=30,output=12,shared=24"),
                        5);
}

ReplayConfig small_config(const ModelPreset& model) {
  ReplayConfig c;
  c.model = &model;
  c.max_num_batched_tokens = 128;
  c.check_rows = 300;
  c.seed = 3;
  return c;
}

ReplayResult expect_correct(const Trace& trace, const ReplayConfig& config) {
  const ReplayResult r = replay(trace, config);
  EXPECT_EQ(r.check.rows, config.check_rows);
  EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
  EXPECT_EQ(r.counters.finished_requests, static_cast<std::int64_t>(trace.requests.size()));
  return r;
}

std::vector<Request> requests_of(int count, std::int64_t prompt, std::int64_t output) {
  std::vector<Request> requests(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    requests[static_cast<std::size_t>(i)].id = i;
    requests[static_cast<std::size_t>(i)].prompt_tokens = prompt;
    requests[static_cast<std::size_t>(i)].output_tokens = output;
    requests[static_cast<std::size_t>(i)].segments = {{7, prompt}};  // all alike
  }
  return requests;
}

TEST(EncoderScheduler, TheEncoderRunsInTheStepOfTheAdmission) {
  BlockPool pool(100), encoder_pool(100);
  SchedulerConfig config;
  config.encoder_tokens = 20;
  config.max_num_batched_tokens = 30;
  Scheduler scheduler(config, &pool, &encoder_pool);
  const auto requests = requests_of(1, 15, 2);
  scheduler.add(requests[0]);
  const RequestBatch first = scheduler.schedule();
  ASSERT_EQ(first.requests.size(), 1U);
  EXPECT_TRUE(first.requests[0].new_encoder);
  EXPECT_EQ(first.requests[0].encoder_blocks.size(), 2U);
  EXPECT_EQ(first.requests[0].num_scheduled_tokens, 10);  // the budget is for both
  scheduler.complete_step();
  EXPECT_EQ(scheduler.counters().encoder_tokens, 20);
  const RequestBatch second = scheduler.schedule();
  EXPECT_FALSE(second.requests[0].new_encoder);
  EXPECT_EQ(second.requests[0].encoder_blocks.size(), 2U);
  EXPECT_EQ(second.requests[0].num_scheduled_tokens, 5);
  scheduler.complete_step();
  scheduler.schedule();
  scheduler.complete_step();
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_EQ(encoder_pool.num_used(), 0);
  EXPECT_EQ(pool.num_used(), 0);
  EXPECT_EQ(scheduler.counters().encoder_tokens, 20);
}

TEST(EncoderScheduler, AnEncoderLongerThanTheBudgetRunsWithOneTokenAndWithoutAnother) {
  BlockPool pool(100), encoder_pool(1000);
  SchedulerConfig config;
  config.encoder_tokens = 500;
  config.max_num_batched_tokens = 10;
  Scheduler scheduler(config, &pool, &encoder_pool);
  const auto requests = requests_of(2, 4, 1);
  for (const Request& r : requests) scheduler.add(r);
  const RequestBatch batch = scheduler.schedule();
  ASSERT_EQ(batch.requests.size(), 1U);
  EXPECT_EQ(batch.requests[0].num_scheduled_tokens, 1);
  scheduler.complete_step();
}

TEST(EncoderScheduler, AnotherEncoderMustFitTheBudgetThatIsLeft) {
  for (const int budget : {124, 125}) {
    BlockPool pool(100), encoder_pool(1000);
    SchedulerConfig config;
    config.encoder_tokens = 60;
    config.max_num_batched_tokens = budget;
    Scheduler scheduler(config, &pool, &encoder_pool);
    const auto requests = requests_of(2, 4, 1);
    for (const Request& r : requests) scheduler.add(r);
    // 64 tokens of the first request leave room for an encoder and no token, or for one.
    EXPECT_EQ(scheduler.schedule().requests.size(), budget == 124 ? 1U : 2U);
    scheduler.complete_step();
  }
}

TEST(EncoderScheduler, PrefixesAreNotReused) {
  BlockPool pool(100), encoder_pool(100);
  SchedulerConfig config;
  config.encoder_tokens = 20;
  Scheduler scheduler(config, &pool, &encoder_pool);
  const auto requests = requests_of(3, 40, 1);
  for (const Request& r : requests) {
    scheduler.add(r);
    scheduler.schedule();
    scheduler.complete_step();
  }
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_EQ(scheduler.counters().prefix_hit_tokens, 0);
}

TEST(EncoderScheduler, ARequestWaitsForEncoderBlocksAndIsRefusedIfTheyNeverSuffice) {
  BlockPool pool(100), encoder_pool(3);
  SchedulerConfig config;
  config.encoder_tokens = 20;  // two blocks
  Scheduler scheduler(config, &pool, &encoder_pool);
  const auto requests = requests_of(2, 4, 1);
  for (const Request& r : requests) scheduler.add(r);
  EXPECT_EQ(scheduler.schedule().requests.size(), 1U);
  scheduler.complete_step();
  EXPECT_EQ(scheduler.schedule().requests.size(), 1U);
  scheduler.complete_step();
  EXPECT_FALSE(scheduler.has_work());

  BlockPool one(1);
  Scheduler never(config, &pool, &one);
  EXPECT_THROW(never.add(requests[0]), OutOfBlocks);
  config.encoder_tokens = 0;
  EXPECT_THROW(Scheduler(config, &pool, &one), InvalidArgument);
}

/// Random workloads: encoder blocks belong to one request at a time, hold still while it runs, are
/// filled once after each admission, and all come back.
TEST(EncoderScheduler, BlocksBelongToOneRequestAtATime) {
  testing::Rng rng(17);
  SCOPED_TRACE(rng.trace());
  std::int64_t preemptions = 0;
  for (int i = 0; i < testing::scaled(200, 20); ++i) {
    SchedulerConfig config;
    config.block_size = rng.pick(std::vector{1, 4, 16});
    config.encoder_tokens = static_cast<int>(rng.integer(1, 50));
    config.max_num_batched_tokens = static_cast<int>(rng.integer(1, 150));
    config.max_num_seqs = static_cast<int>(rng.integer(1, 8));
    const std::int64_t each = ceil_div(config.encoder_tokens, config.block_size);
    BlockPool encoder_pool(each * rng.integer(1, 6) + rng.integer(0, each - 1));
    BlockPool pool(ceil_div(60, config.block_size) + rng.integer(0, 60));
    Scheduler scheduler(config, &pool, &encoder_pool);
    const auto requests = requests_of(10, rng.integer(1, 40), rng.integer(0, 20));
    for (const Request& r : requests) scheduler.add(r);
    std::vector<std::vector<std::int32_t>> held(requests.size());
    std::int64_t encoder_runs = 0;
    while (scheduler.has_work()) {
      const RequestBatch& batch = scheduler.schedule();
      std::set<std::int32_t> owned;
      for (const ScheduledRequest& r : batch.requests) {
        auto& mine = held[static_cast<std::size_t>(r.request->id)];
        if (r.new_encoder) mine.assign(r.encoder_blocks.begin(), r.encoder_blocks.end());
        ASSERT_THAT(mine, ::testing::ElementsAreArray(r.encoder_blocks));
        ASSERT_EQ(static_cast<std::int64_t>(mine.size()), each);
        ASSERT_EQ(r.new_encoder, r.num_computed_tokens == 0);
        owned.insert(mine.begin(), mine.end());
        encoder_runs += r.new_encoder ? 1 : 0;
      }
      ASSERT_EQ(static_cast<std::int64_t>(owned.size()),
                each * static_cast<std::int64_t>(batch.requests.size()));
      scheduler.complete_step();
    }
    EXPECT_EQ(encoder_pool.num_used(), 0);
    EXPECT_EQ(encoder_pool.violation(), "");
    const SchedulerCounters& c = scheduler.counters();
    EXPECT_EQ(c.encoder_tokens, encoder_runs * config.encoder_tokens);
    EXPECT_EQ(encoder_runs, 10 + c.preemptions);
    preemptions += c.preemptions;
  }
  EXPECT_GT(preemptions, 0);
}

TEST(LayerGroups, AreNumberedThroughInTheOrderOfAStep) {
  const ModelPreset model = small_whisper();
  LayerGroupConfig config{.model = model, .backend = find_backend("FLASH_ATTN"), .num_layers = 2};
  config.cache.num_blocks = config.encoder_cache.num_blocks = 4;
  config.cache.block_size = config.encoder_cache.block_size = 16;
  config.cache.num_kv_heads = config.encoder_cache.num_kv_heads = 4;
  config.cache.head_size = config.encoder_cache.head_size = 16;
  const auto groups = make_layer_groups(config);
  ASSERT_EQ(groups.size(), 3U);
  EXPECT_EQ(groups[0].kind.type, AttentionType::encoder);
  EXPECT_THAT(groups[0].layers, ElementsAre(4, 5));
  EXPECT_EQ(groups[1].kind.type, AttentionType::decoder);
  EXPECT_THAT(groups[1].layers, ElementsAre(0, 1));
  EXPECT_EQ(groups[2].kind.type, AttentionType::encoder_decoder);
  EXPECT_THAT(groups[2].layers, ElementsAre(2, 3));
}

TEST(CrossReplay, ChecksOutForEveryDtypeAndLayout) {
  const ModelPreset model = small_whisper();
  const Trace trace = small_trace(testing::scaled(12, 3));
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
      SCOPED_TRACE(std::string(to_string(dtype)) + " " + std::string(to_string(layout)));
      ReplayConfig config = small_config(model);
      config.dtype = dtype;
      config.kv_layout = layout;
      config.num_layers = 2;
      const ReplayResult r = expect_correct(trace, config);
      EXPECT_EQ(r.counters.encoder_tokens, 45 * r.requests);
      EXPECT_EQ(r.counters.prefix_hit_tokens, 0);
      EXPECT_EQ(r.num_encoder_blocks, 3 * r.requests);
    }
  }
}

TEST(CrossReplay, ChecksOutWithDraftsAndAnFp8Cache) {
  const ModelPreset model = small_whisper();
  ReplayConfig config = small_config(model);
  config.num_speculative_tokens = 3;
  config.kv_cache_dtype = "fp8_e4m3";
  EXPECT_GT(expect_correct(small_trace(), config).counters.accepted_tokens, 0);
}

TEST(CrossReplay, SurvivesPreemptionAndFewEncoderBlocks) {
  const ModelPreset model = small_whisper();
  ReplayConfig config = small_config(model);
  config.num_blocks = 14;
  config.num_encoder_blocks = 11;  // three requests at a time
  const ReplayResult r = expect_correct(small_trace(), config);
  EXPECT_GT(r.counters.preemptions, 0);
  EXPECT_EQ(r.counters.encoder_tokens, 45 * (r.requests + r.counters.preemptions));
  EXPECT_EQ(r.num_encoder_blocks, 11);
  EXPECT_EQ(r.peak_used_encoder_blocks, 9);
}

TEST(CrossReplay, FaultsOfTheEncodersCacheAreCaught) {
  const ModelPreset model = small_whisper();
  const auto expect_caught = [&](auto spoil) {
    ReplayConfig config = small_config(model);
    config.fault_injection = [&](CommonMetadata& m) {
      if (!m.encoder_seq_lens.empty()) spoil(m);
    };
    EXPECT_GT(replay(small_trace(), config).check.failed, 0);
  };
  // A wrong slot. Two that are swapped change nothing: all queries see both keys.
  expect_caught([](CommonMetadata& m) {
    if (!m.encoder_slot_mapping.empty()) m.encoder_slot_mapping[0] = m.encoder_slot_mapping[1];
  });
  expect_caught([](CommonMetadata& m) {  // a skipped write
    if (!m.encoder_slot_mapping.empty()) m.encoder_slot_mapping.back() = -1;
  });
  expect_caught([](CommonMetadata& m) {  // a block of another request
    auto* table = static_cast<std::int32_t*>(const_cast<void*>(m.block_table.data));
    if (m.num_reqs > 1) table[1] = table[m.block_table.strides[0] + 1];
  });
  expect_caught([](CommonMetadata& m) { m.encoder_seq_lens.back() -= 1; });  // one key too few
}

TEST(CrossReplay, ShowsTheValuesOfBothCaches) {
  const ModelPreset model = small_whisper();
  ReplayConfig config = small_config(model);
  config.num_layers = 2;
  std::vector<std::int64_t> rows(4);
  config.on_values = [&](int layer, const ConstTensorView& value) {
    rows.at(static_cast<std::size_t>(layer)) += value.shape[0];
  };
  const ReplayResult r = replay(small_trace(), config);
  EXPECT_THAT(rows, ElementsAre(r.counters.computed_tokens, r.counters.computed_tokens,
                                r.counters.encoder_tokens, r.counters.encoder_tokens));
}

TEST(CrossReplay, RefusesBadSettings) {
  const ModelPreset model = small_whisper();
  ReplayConfig config = small_config(model);
  config.num_encoder_blocks = 2;
  EXPECT_THROW(replay(small_trace(), config), OutOfBlocks);
  config.num_encoder_blocks = 0;
  EXPECT_THROW(replay(small_trace(), config), InvalidArgument);
  ModelPreset decoder = small_whisper();
  decoder.encoder_tokens = 0;
  config.model = &decoder;
  config.num_encoder_blocks = 5;
  EXPECT_THROW(replay(small_trace(), config), InvalidArgument);
}

}  // namespace
}  // namespace attend::serving
