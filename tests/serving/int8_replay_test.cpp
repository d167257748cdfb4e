// SPDX-License-Identifier: Apache-2.0
// Replays from int8 caches: every row checks out in float64, and faults are caught.
#include <gmock/gmock.h>

#include <map>
#include <optional>
#include <string>

#include "attend/core/error.h"
#include "serving/replay.h"
#include "serving/synthetic.h"
#include "support/scale.h"

namespace attend::serving {
namespace {

using ::testing::HasSubstr;

/// Scales that differ from layer to layer, head to head and element to element. Generated values
/// reach 1.73: some are beyond the range of their codes.
ValueScales scales_of(const ModelPreset& model, int num_layers) {
  ValueScales s{model.num_caches(num_layers), model.num_kv_heads, model.head_dim, {}};
  const auto count = static_cast<std::size_t>(s.num_layers * s.num_kv_heads * s.head_size);
  for (std::size_t i = 0; i < count; ++i) {
    s.scales.push_back((1.5F + 0.01F * static_cast<float>(i * 37 % 101)) / 127);
  }
  return s;
}

class Int8Replay : public ::testing::TestWithParam<KvFormat> {
 protected:
  Int8Replay() {
    model_.name = "small";
    model_.num_q_heads = 4;
    model_.num_kv_heads = 2;
    model_.head_dim = 32;
    model_.num_layers = 4;
    config_.model = &model_;
    config_.num_layers = 2;
    config_.max_num_batched_tokens = 64;
    config_.check_rows = 200;
    config_.seed = 3;
    config_.kv_cache_dtype = to_string(GetParam());
  }

  static Trace trace(int requests = 12) {
    return make_synthetic(SyntheticConfig::parse("synthetic:requests=" + std::to_string(requests) +
                                                 ",prompt=60,output=20,shared=40"),
                          5);
  }
  static Trace any_trace() { return trace(testing::scaled(12, 3)); }

  ReplayResult run(const Trace& trace) {
    if (GetParam() == KvFormat::int8_level1) {
      scales_ = scales_of(model_, config_.num_layers);
      config_.value_scales = &*scales_;
    }
    return replay(trace, config_);
  }
  ReplayResult expect_correct(const Trace& trace) {
    const ReplayResult r = run(trace);
    EXPECT_EQ(r.check.rows, config_.check_rows);
    EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
    EXPECT_GT(r.check.worst_error, 0.0);
    EXPECT_EQ(r.counters.finished_requests, static_cast<std::int64_t>(trace.requests.size()));
    EXPECT_EQ(r.kv_cache_dtype, to_string(GetParam()));
    return r;
  }
  void expect_caught(std::function<void(CommonMetadata&)> fault) {
    config_.fault_injection = std::move(fault);
    EXPECT_GT(run(trace()).check.failed, 0);
  }

  ModelPreset model_;
  ReplayConfig config_;
  std::optional<ValueScales> scales_;
};

TEST_P(Int8Replay, ChecksOutForEveryDtype) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    if (dtype == DType::f32 && GetParam() == KvFormat::int8_level2) continue;
    SCOPED_TRACE(to_string(dtype));
    config_.dtype = dtype;
    expect_correct(any_trace());
  }
}

TEST_P(Int8Replay, ChecksOutWithWindowSoftcapAlibiAndSinks) {
  model_.sliding_window = 24;
  model_.window_period = 2;
  model_.softcap = 20;
  model_.sinks = true;
  expect_correct(any_trace());
  model_.sliding_window.reset();
  model_.alibi = true;
  expect_correct(any_trace());
}

TEST_P(Int8Replay, ChecksOutBeyondAPieceOf256Keys) {
  config_.max_num_batched_tokens = 200;
  expect_correct(make_synthetic(
      SyntheticConfig::parse("synthetic:requests=3,prompt=500,output=5,shared=300"), 5));
}

TEST_P(Int8Replay, SharesPrefixesAndSurvivesPreemption) {
  config_.num_blocks = 25;
  const ReplayResult r = expect_correct(trace());
  EXPECT_GT(r.counters.preemptions, 0);
  EXPECT_GT(r.counters.prefix_hit_tokens, 0);
}

TEST_P(Int8Replay, ChecksOutWithPrefixesReadOnce) {
  config_.cascade = CascadeMode::always;
  const ReplayResult r = expect_correct(make_synthetic(
      SyntheticConfig::parse("synthetic:requests=4,prompt=320,output=6,shared=300"), 5));
  EXPECT_GT(r.cascade_steps, 0);
}

TEST_P(Int8Replay, ChecksOutWithDrafts) {
  config_.num_speculative_tokens = 4;
  config_.acceptance = 0.6;
  const ReplayResult r = expect_correct(any_trace());
  EXPECT_GT(r.counters.accepted_tokens, 0);
  EXPECT_LT(r.counters.accepted_tokens, r.counters.draft_tokens);
}

TEST_P(Int8Replay, ChecksOutWithCrossAttention) {
  model_.encoder_tokens = 45;
  config_.check_rows = 400;
  const ReplayResult r = expect_correct(any_trace());
  EXPECT_EQ(r.counters.encoder_tokens, 45 * r.requests);
}

TEST_P(Int8Replay, AWrongSlotIsCaught) {
  expect_caught([](CommonMetadata& m) {
    if (m.num_tokens > 1) std::swap(m.slot_mapping[0], m.slot_mapping[1]);
  });
}

TEST_P(Int8Replay, ASkippedWriteIsCaught) {
  expect_caught([](CommonMetadata& m) { m.slot_mapping.back() = -1; });
}

TEST_P(Int8Replay, ABlockOfAnotherRequestIsCaught) {
  expect_caught([](CommonMetadata& m) {
    if (m.num_reqs < 2) return;
    auto* table = static_cast<std::int32_t*>(const_cast<void*>(m.block_table.data));
    const std::int64_t row = m.block_table.strides[0];
    const std::int64_t last = (m.seq_lens[0] - 1) / 16;
    if ((m.seq_lens[1] - 1) / 16 >= last) table[last] = table[row + last];
  });
}

TEST_P(Int8Replay, AStaleDraftIsCaught) {
  // The token that comes where a draft was rejected is not written: its slot keeps the draft.
  std::map<std::int64_t, int> written;
  int stale = 0;
  config_.num_speculative_tokens = 4;
  config_.acceptance = 0.0;
  config_.max_num_seqs = 1;
  expect_caught([&](CommonMetadata& m) {
    for (std::int64_t& slot : m.slot_mapping) {
      if (m.max_query_len <= 5 && written[slot]++ > 0) {
        slot = -1;
        ++stale;
      }
    }
  });
  EXPECT_GT(stale, 0);
}

TEST_P(Int8Replay, CountsCodesAndScales) {
  const ReplayResult r = run(any_trace());
  // Of a token and head: codes, or level 2's 16-bit values, and one f32 scale a row that has one.
  const int bytes = GetParam() == KvFormat::int8_level1   ? 32 + 32 + 4
                    : GetParam() == KvFormat::int8_level2 ? 32 + 2 * 32 + 4
                                                          : 32 + 32 + 2 * 4;
  EXPECT_EQ(r.block_bytes, 16 * 2 * bytes);
  config_.kv_cache_dtype = "auto";
  config_.value_scales = nullptr;
  const ReplayResult plain = replay(any_trace(), config_);
  ASSERT_EQ(r.steps.size(), plain.steps.size());
  double decode_bytes = 0;
  for (std::size_t i = 0; i < r.steps.size(); ++i) {
    EXPECT_EQ(r.steps[i].decode_bytes * (2 * 32 * 2), plain.steps[i].decode_bytes * bytes);
    decode_bytes += r.steps[i].decode_bytes;
  }
  EXPECT_GT(decode_bytes, 0.0);
}

INSTANTIATE_TEST_SUITE_P(Formats, Int8Replay,
                         ::testing::Values(KvFormat::int8_level1, KvFormat::int8_level2,
                                           KvFormat::int8_per_token_head),
                         [](const auto& test) { return std::string(to_string(test.param)); });

TEST(Int8ReplaySettings, ScalesMustBeThereForLevel1OnlyAndFit) {
  ModelPreset model;
  model.num_q_heads = model.num_kv_heads = 2;
  model.head_dim = 16;
  const Trace trace = make_synthetic(SyntheticConfig::parse("synthetic:requests=1,shared=0"), 5);
  const auto expect_refused = [&](const char* dtype, const ValueScales* scales,
                                  const std::string& text) {
    ReplayConfig config;
    config.model = &model;
    config.num_layers = 2;
    config.kv_cache_dtype = dtype;
    config.value_scales = scales;
    try {
      replay(trace, config);
      ADD_FAILURE() << text;
    } catch (const InvalidArgument& e) {
      EXPECT_THAT(e.what(), HasSubstr("value-scales"));
      EXPECT_THAT(e.what(), HasSubstr(text));
    }
  };
  const ValueScales good = scales_of(model, 2);
  expect_refused("int8_level1", nullptr, "2 layers, 2 kv heads x 16 elements");
  for (const char* dtype : {"auto", "fp8_e4m3", "int8_level2", "int8_per_token_head"}) {
    expect_refused(dtype, &good, "no scales");
  }
  const ValueScales short_run = scales_of(model, 1);
  expect_refused("int8_level1", &short_run, "got scales of 1 layer,");
  ValueScales bad = good;
  bad.num_kv_heads = 1;
  expect_refused("int8_level1", &bad, "got scales of 2 layers, 1 kv heads");
  bad = good;
  bad.head_size = 8;
  expect_refused("int8_level1", &bad, "x 8 elements");
  bad = good;
  bad.scales.pop_back();
  expect_refused("int8_level1", &bad, "64 numbers, got 63");
  model.encoder_tokens = 20;  // cross attention has layers of its own
  expect_refused("int8_level1", &good, "expected scales of 4 layers");
}

TEST(Int8ReplaySettings, LevelsHaveOneLayout) {
  ModelPreset model;
  model.num_q_heads = model.num_kv_heads = 2;
  model.head_dim = 16;
  ReplayConfig config;
  config.model = &model;
  config.kv_cache_dtype = "int8_level2";
  config.check_rows = 10;
  const Trace trace =
      make_synthetic(SyntheticConfig::parse("synthetic:requests=1,prompt=20,output=2,shared=0"), 5);
  EXPECT_EQ(replay(trace, config).kv_layout, KvLayout::hnd);
  config.kv_layout = KvLayout::nhd;
  EXPECT_THROW(replay(trace, config), InvalidArgument);
  config.kv_cache_dtype = "int8_per_token_head";
  const ReplayResult r = replay(trace, config);
  EXPECT_EQ(r.kv_layout, KvLayout::nhd);
  EXPECT_EQ(r.check.failed, 0);
}

}  // namespace
}  // namespace attend::serving
