// SPDX-License-Identifier: Apache-2.0
// The whole way of the data: trace, scheduler, pool, builder, impl, float64 check.
#include "serving/replay.h"

#include <gmock/gmock.h>

#include <filesystem>

#include "serving/synthetic.h"
#include "support/scale.h"

namespace attend::serving {
namespace {

using ::testing::HasSubstr;

ModelPreset small_model() {
  ModelPreset m;
  m.name = "small";
  m.num_q_heads = 4;
  m.num_kv_heads = 2;
  m.head_dim = 32;
  m.num_layers = 4;
  return m;
}

Trace small_trace(const std::string& settings = "requests=12,prompt=60,output=20,shared=40") {
  return make_synthetic(SyntheticConfig::parse("synthetic:" + settings), 5);
}

/// For tests that need no more than some requests; shorter where everything is slow.
Trace any_trace() {
  const int requests = testing::scaled(12, 3);
  return small_trace("requests=" + std::to_string(requests) + ",prompt=60,output=20,shared=40");
}

ReplayConfig small_config(const ModelPreset& model) {
  ReplayConfig c;
  c.model = &model;
  c.max_num_batched_tokens = 64;
  c.check_rows = 100;
  c.seed = 3;
  return c;
}

void expect_correct(const Trace& trace, const ReplayConfig& config) {
  const ReplayResult r = replay(trace, config);
  EXPECT_EQ(r.check.rows, config.check_rows);
  EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
  EXPECT_GT(r.check.worst_error, 0.0);
  EXPECT_EQ(r.counters.finished_requests, static_cast<std::int64_t>(trace.requests.size()));
}

TEST(Replay, ChecksOutWhereRequestsAttendOnceToWhatTheyShare) {
  const ModelPreset model = small_model();
  const Trace trace = small_trace("requests=10,prompt=20,output=12,shared=300");
  for (const CascadeMode mode :
       {CascadeMode::always, CascadeMode::vllm, CascadeMode::automatic, CascadeMode::off}) {
    SCOPED_TRACE(to_string(mode));
    ReplayConfig config = small_config(model);
    config.max_num_batched_tokens = 400;
    config.cascade = mode;
    expect_correct(trace, config);
    const ReplayResult r = replay(trace, config);
    EXPECT_TRUE(mode != CascadeMode::off || r.cascade_steps == 0) << r.cascade_steps;
    EXPECT_TRUE(mode != CascadeMode::always || r.cascade_steps > 0) << r.cascade_steps;
    EXPECT_LE(r.cascade_steps, static_cast<std::int64_t>(r.steps.size()));
  }
}

TEST(Replay, ChecksOutForEveryDtypeAndLayout) {
  const ModelPreset model = small_model();
  const Trace trace = any_trace();
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
      SCOPED_TRACE(std::string(to_string(dtype)) + " " + std::string(to_string(layout)));
      ReplayConfig config = small_config(model);
      config.dtype = dtype;
      config.kv_layout = layout;
      config.num_layers = 2;
      expect_correct(trace, config);
    }
  }
}

// float32 results of an fp8 cache show what a weight was.
TEST(Replay, ChecksOutInEitherArithmetic) {
  const ModelPreset model = small_model();
  const Trace trace = any_trace();
  const auto run = [&](Arithmetic arithmetic) {
    ReplayConfig config = small_config(model);
    config.dtype = DType::f32;
    config.kv_cache_dtype = "fp8_e4m3";
    config.arithmetic = arithmetic;
    const ReplayResult r = replay(trace, config);
    EXPECT_EQ(r.check.rows, config.check_rows);
    EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
    EXPECT_EQ(r.kernel_kind, KernelKind::fp8_e4m3);
    return r;
  };
  const ReplayResult exact = run(Arithmetic::exact), automatic = run(Arithmetic::automatic);
  EXPECT_FALSE(has_fast_kernel(exact.isa, exact.kernel_kind));
  if (has_fast_kernel(automatic.isa, automatic.kernel_kind)) {
    EXPECT_NE(exact.check.worst_error, automatic.check.worst_error);
    EXPECT_EQ(run(Arithmetic::fast).check.worst_error, automatic.check.worst_error);
  } else {
    EXPECT_EQ(exact.isa, automatic.isa);
    EXPECT_EQ(exact.check.worst_error, automatic.check.worst_error);
    EXPECT_THROW(run(Arithmetic::fast), Unsupported);
  }
}

TEST(Replay, ChecksOutWithWindowSoftcapAndAlibi) {
  const Trace trace = any_trace();
  ModelPreset model = small_model();
  model.sliding_window = 24;
  model.window_period = 2;
  model.softcap = 20;
  model.scale = 0.3F;
  ReplayConfig config = small_config(model);
  config.num_layers = 3;
  expect_correct(trace, config);
  model = small_model();
  model.alibi = true;
  expect_correct(trace, config);
  model.alibi_sqrt = true;
  expect_correct(trace, config);
}

TEST(Replay, ChecksOutWithSinksAndSeveralWindowedLayersInARow) {
  ModelPreset model = small_model();
  model.sinks = true;
  model.sliding_window = 10;
  model.window_period = 3;
  model.windowed_layers_of_one = 2;
  ReplayConfig config = small_config(model);
  config.num_layers = 4;
  expect_correct(any_trace(), config);
}

TEST(Replay, ChecksOutForEncoders) {
  const Trace trace = any_trace();
  ModelPreset model = small_model();
  model.attn_type = AttentionType::encoder_only;
  const ReplayResult r = replay(trace, small_config(model));
  EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
  EXPECT_EQ(r.num_blocks, 0);
  EXPECT_EQ(r.counters.generated_tokens, 0);
}

TEST(Replay, PublicTracesCheckOut) {
  const auto folder = std::filesystem::path(ATTEND_SOURCE_DIR) / "../shared/traces";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "no ../shared/traces";
  const ModelPreset model = small_model();
  for (const auto* file : {"azure_llm_2023_conv.csv", "mooncake_fast25_conversation_trace.jsonl"}) {
    SCOPED_TRACE(file);
    Trace trace = read_trace((folder / file).string());
    limit_requests(trace, testing::scaled(12, 3));
    scale_lengths(trace, 0.05);
    ReplayConfig config = small_config(model);
    config.max_num_batched_tokens = 512;
    expect_correct(trace, config);
  }
}

TEST(Replay, SharesPrefixesAndSurvivesPreemption) {
  const ModelPreset model = small_model();
  const Trace trace = small_trace();
  ReplayConfig config = small_config(model);
  config.num_blocks = 25;
  const ReplayResult r = replay(trace, config);
  EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
  EXPECT_GT(r.counters.preemptions, 0);
  EXPECT_GT(r.counters.prefix_hit_tokens, 0);
  EXPECT_EQ(r.peak_used_blocks, 25);
}

TEST(Replay, IsReproducible) {
  const ModelPreset model = small_model();
  const Trace trace = small_trace();
  ReplayConfig config = small_config(model);
  const auto two = make_thread_pool(2), one = make_thread_pool(1);
  config.executor = two.get();
  const ReplayResult a = replay(trace, config);
  config.executor = one.get();
  const ReplayResult b = replay(trace, config);
  EXPECT_EQ(a.steps.size(), b.steps.size());
  EXPECT_EQ(a.check.worst_error, b.check.worst_error) << "same rows, same bits";
  EXPECT_EQ(a.counters.computed_tokens, b.counters.computed_tokens);
}

TEST(Replay, AWrongSlotIsCaught) {
  const ModelPreset model = small_model();
  ReplayConfig config = small_config(model);
  config.fault_injection = [](CommonMetadata& m) {
    if (m.num_tokens > 1) std::swap(m.slot_mapping[0], m.slot_mapping[1]);
  };
  const ReplayResult r = replay(small_trace(), config);
  EXPECT_GT(r.check.failed, 0);
  EXPECT_GT(r.check.worst_ratio_to_bound, 1.0);
  EXPECT_THAT(r.check.failures.at(0), HasSubstr("request "));
}

TEST(Replay, ASkippedWriteIsCaught) {
  const ModelPreset model = small_model();
  ReplayConfig config = small_config(model);
  config.fault_injection = [](CommonMetadata& m) { m.slot_mapping.back() = -1; };
  EXPECT_GT(replay(small_trace(), config).check.failed, 0);
}

TEST(Replay, ABlockOfAnotherRequestIsCaught) {
  const ModelPreset model = small_model();
  ReplayConfig config = small_config(model);
  config.fault_injection = [](CommonMetadata& m) {
    if (m.num_reqs < 2) return;
    auto* table = static_cast<std::int32_t*>(const_cast<void*>(m.block_table.data));
    const std::int64_t row = m.block_table.strides[0];
    // The last block of the first request, as if a prefix were shared too far.
    const std::int64_t last = (m.seq_lens[0] - 1) / 16;
    if ((m.seq_lens[1] - 1) / 16 >= last) table[last] = table[row + last];
  };
  EXPECT_GT(replay(small_trace(), config).check.failed, 0);
}

TEST(Replay, ShowsTheValuesOfEveryLayer) {
  const ModelPreset model = small_model();
  const Trace trace = any_trace();
  ReplayConfig config = small_config(model);
  config.num_layers = 2;
  config.dtype = DType::f32;
  const ValueGenerator generator(config.seed, DType::f32);
  std::int64_t rows[2] = {0, 0};
  bool first_row_seen = false;
  config.on_values = [&](int layer, const ConstTensorView& value) {
    ASSERT_EQ(value.shape[1], 2);
    ASSERT_EQ(value.shape[2], 32);
    if (rows[layer] == 0) {  // the first step begins with the first token of some prompt
      std::vector<float> expected(32);
      generator.fill_f32({content_id(trace.requests[0], 0), 0, layer, 1, ValueKind::value}, 32,
                         expected.data());
      const float* got = value.select(0, 0).select(0, 1).as<float>();
      first_row_seen = std::equal(expected.begin(), expected.end(), got);
      EXPECT_TRUE(first_row_seen);
    }
    rows[layer] += value.shape[0];
  };
  const ReplayResult r = replay(trace, config);
  EXPECT_TRUE(first_row_seen);
  EXPECT_EQ(rows[0], r.counters.computed_tokens);
  EXPECT_EQ(rows[1], rows[0]);
}

TEST(Replay, ReportsProgress) {
  const ModelPreset model = small_model();
  ReplayConfig config = small_config(model);
  std::vector<ReplayProgress> seen;
  config.on_progress = [&](const ReplayProgress& p) { seen.push_back(p); };
  const ReplayResult r = replay(small_trace(), config);
  ASSERT_EQ(seen.size(), r.steps.size());
  EXPECT_EQ(seen.back().finished_requests, 12);
  EXPECT_EQ(seen.back().fraction, 1.0);
  EXPECT_LT(seen.front().fraction, 1.0);
}

TEST(Replay, Fp8CachesAreCheckedAgainstTheRoundedValues) {
  const ModelPreset model = small_model();
  for (const char* dtype : {"fp8_e4m3", "fp8_e5m2"}) {
    ReplayConfig config = small_config(model);
    config.kv_cache_dtype = dtype;
    expect_correct(any_trace(), config);
  }
}

TEST(Replay, RealtimeWaitsForArrivals) {
  const ModelPreset model = small_model();
  Trace trace = small_trace("requests=2,prompt=10,output=1,spread=0,shared=0");
  trace.requests[1].arrival = 0.05;
  ReplayConfig config = small_config(model);
  config.realtime = true;
  double seconds = 0;
  config.on_progress = [&](const ReplayProgress& p) { seconds = p.seconds; };
  EXPECT_EQ(replay(trace, config).steps.size(), 2U);
  EXPECT_GE(seconds, 0.05);
}

TEST(Replay, RefusesBadSettings) {
  const ModelPreset model = small_model();
  const Trace trace = small_trace();
  const auto expect_refused = [&](auto change) {
    ReplayConfig config = small_config(model);
    change(config);
    EXPECT_THROW(replay(trace, config), Error);
  };
  expect_refused([](ReplayConfig& c) { c.num_layers = 0; });
  expect_refused([](ReplayConfig& c) { c.num_blocks = 0; });
  expect_refused([](ReplayConfig& c) { c.num_blocks = 2; });
  expect_refused([](ReplayConfig& c) { c.num_blocks = std::int64_t{1} << 40; });
  expect_refused([](ReplayConfig& c) { c.block_size = 10; });
  expect_refused([](ReplayConfig& c) { c.check_rows = -1; });
  expect_refused([](ReplayConfig& c) { c.max_num_batched_tokens = 0; });
  expect_refused([](ReplayConfig& c) { c.backend = "NO_SUCH_BACKEND"; });
  expect_refused([](ReplayConfig& c) { c.kv_cache_dtype = "int8"; });
  expect_refused([](ReplayConfig& c) { c.dtype = DType::i8; });
}

TEST(Replay, DefaultBlocksHoldTheTraceOrAQuarterOfTheMemory) {
  Trace trace;
  trace.requests.resize(2);
  trace.requests[0].prompt_tokens = 17;
  trace.requests[1].prompt_tokens = 16;
  EXPECT_EQ(default_num_blocks(trace, 16, 1024, 1), 3);
  trace.requests[0].prompt_tokens = 1 << 30;
  const auto limited = default_num_blocks(trace, 1, 1 << 20, 2);
  EXPECT_GT(limited, 1);
  EXPECT_LT(limited, 1 << 30);
}

}  // namespace
}  // namespace attend::serving
