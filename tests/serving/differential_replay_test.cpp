// SPDX-License-Identifier: Apache-2.0
// Replays of models with differential attention: every row checks out in float64, and faults are
// caught.
#include <gmock/gmock.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "attend/core/error.h"
#include "serving/replay.h"
#include "serving/synthetic.h"
#include "support/scale.h"

namespace attend::serving {
namespace {

using ::testing::HasSubstr;

/// The model with few heads, and a window that short prompts reach beyond.
ModelPreset small(std::string_view name) {
  ModelPreset m = find_model(name);
  m.num_q_heads = 8;
  m.num_kv_heads = 4;
  m.head_dim = 24;
  if (m.sliding_window) m.sliding_window = 24;
  return m;
}

Trace trace_of(const std::string& settings) {
  return make_synthetic(SyntheticConfig::parse("synthetic:" + settings), 5);
}

Trace any_trace() {
  // As many at every scale: few requests share no prefix, and then a fault may not show.
  return trace_of("requests=10,prompt=60,output=12,shared=40");
}

ReplayConfig config_of(const ModelPreset& model) {
  ReplayConfig c;
  c.model = &model;
  c.num_layers = 4;
  c.max_num_batched_tokens = 400;
  c.check_rows = testing::scaled(150, 60);
  c.seed = 3;
  return c;
}

ReplayResult expect_correct(const Trace& trace, const ReplayConfig& config) {
  const ReplayResult r = replay(trace, config);
  EXPECT_EQ(r.backend, "DIFFERENTIAL_FLASH_ATTN");
  EXPECT_EQ(r.check.rows, config.check_rows);
  EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
  EXPECT_GT(r.check.worst_error, 0.0);
  EXPECT_EQ(r.counters.finished_requests, static_cast<std::int64_t>(trace.requests.size()));
  return r;
}

/// (model, type of the cache)
class DifferentialReplay : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {
 protected:
  DifferentialReplay() : model_(small(std::get<0>(GetParam()))), config_(config_of(model_)) {
    config_.kv_cache_dtype = std::get<1>(GetParam());
  }
  void expect_caught(std::function<void(CommonMetadata&)> fault) {
    config_.fault_injection = std::move(fault);
    EXPECT_GT(replay(any_trace(), config_).check.failed, 0);
  }

  ModelPreset model_;
  ReplayConfig config_;
};

TEST_P(DifferentialReplay, ChecksOutAndSharesPrefixes) {
  const ReplayResult r = expect_correct(any_trace(), config_);
  EXPECT_GT(r.counters.prefix_hit_tokens, 0);
  // Two branches have the bytes of an ordinary cache, and sharing layers none.
  const int element = std::get<1>(GetParam()) == "auto" ? 2 : 1;
  EXPECT_EQ(r.block_bytes, r.block_size * 2 * 4 * 24 * element);
  const std::int64_t caches = model_.num_caches(4);
  EXPECT_EQ(caches, model_.shares_caches() ? 3 : 4);
  EXPECT_EQ(r.memory.bytes, caches * r.num_blocks * r.block_bytes);
}

TEST_P(DifferentialReplay, ChecksOutForPromptsInPiecesInMixedBatchesWithPreemption) {
  config_.max_num_batched_tokens = 40;
  config_.num_blocks = 30;
  const ReplayResult r =
      expect_correct(trace_of("requests=10,prompt=100,output=30,shared=40,spread=0.5"), config_);
  EXPECT_GT(r.counters.preemptions, 0);
  EXPECT_TRUE(std::ranges::any_of(
      r.steps, [](const StepRecord& s) { return s.prefill_flops > 0 && s.decode_bytes > 0; }));
}

TEST_P(DifferentialReplay, ChecksOutWithDrafts) {
  config_.num_speculative_tokens = 3;
  config_.acceptance = 0.6;
  const ReplayResult r = expect_correct(any_trace(), config_);
  EXPECT_GT(r.counters.accepted_tokens, 0);
  EXPECT_LT(r.counters.accepted_tokens, r.counters.draft_tokens);
}

TEST_P(DifferentialReplay, ChecksOutWhereRequestsAttendOnceToWhatTheyShare) {
  const Trace trace = trace_of("requests=8,prompt=20,output=8,shared=300");
  config_.cascade = CascadeMode::always;
  EXPECT_GT(expect_correct(trace, config_).cascade_steps, 0);
  config_.cascade = CascadeMode::off;
  EXPECT_EQ(expect_correct(trace, config_).cascade_steps, 0);
}

TEST_P(DifferentialReplay, AWrongSlotIsCaught) {
  expect_caught([](CommonMetadata& m) {
    if (m.num_tokens > 1) std::swap(m.slot_mapping[0], m.slot_mapping[1]);
  });
}

TEST_P(DifferentialReplay, ABlockOfAnotherRequestIsCaught) {
  expect_caught([](CommonMetadata& m) {
    if (m.num_reqs < 2) return;
    auto* table = static_cast<std::int32_t*>(const_cast<void*>(m.block_table.data));
    const std::int64_t row = m.block_table.strides[0];
    std::swap(table[0], table[row + 1]);
  });
}

INSTANTIATE_TEST_SUITE_P(Caches, DifferentialReplay,
                         ::testing::Combine(::testing::Values("phi-4-mini-flash", "diffllama"),
                                            ::testing::Values("auto", "fp8_e4m3", "fp8_e5m2")),
                         [](const auto& info) {
                           return (std::get<0>(info.param) == "diffllama" ? "halves_"
                                                                          : "interleaved_") +
                                  std::get<1>(info.param);
                         });

TEST(DifferentialReplayOfOtherTypes, ChecksOut) {
  for (const auto* name : {"phi-4-mini-flash", "diffllama"}) {
    const ModelPreset model = small(name);
    ReplayConfig config = config_of(model);
    for (const DType dtype : {DType::f32, DType::f16}) {
      for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
        config.dtype = dtype;
        config.kv_layout = layout;
        expect_correct(any_trace(), config);
      }
    }
  }
}

TEST(DifferentialReplayOfOtherTypes, ChecksOutForAnyNumberOfLayers) {
  const ModelPreset model = small("phi-4-mini-flash");
  ReplayConfig config = config_of(model);
  for (const int layers : {1, 2, 3, 16}) {
    config.num_layers = layers;
    expect_correct(any_trace(), config);
  }
}

TEST(DifferentialReplayOfOtherTypes, WhatIsNotServedIsRefused) {
  const ModelPreset model = small("phi-4-mini-flash");
  const auto message = [&](const auto& change) -> std::string {
    ReplayConfig config = config_of(model);
    change(config);
    try {
      replay(any_trace(), config);
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  using Config = ReplayConfig;
  EXPECT_THAT(message([](Config& c) { c.num_layers = 17; }), HasSubstr("from 1 to 16"));
  EXPECT_THAT(message([](Config& c) { c.kv_cache_dtype = "int8_level2"; }),
              HasSubstr("kv_cache_dtype"));
  EXPECT_THAT(message([](Config& c) { c.block_size = 24; }), HasSubstr("multiple of 16"));
  EXPECT_THAT(message([](Config& c) { c.backend = "FLASH_ATTN"; }), HasSubstr("differential"));
  EXPECT_THAT(message([](Config& c) { c.arithmetic = Arithmetic::fast; }), HasSubstr("arithmetic"));
}

}  // namespace
}  // namespace attend::serving
