// SPDX-License-Identifier: Apache-2.0
// Replays of models with latent attention: every row checks out in float64, and faults are caught.
#include <gmock/gmock.h>

#include <algorithm>
#include <string>
#include <utility>

#include "attend/core/error.h"
#include "serving/replay.h"
#include "serving/synthetic.h"
#include "support/scale.h"

namespace attend::serving {
namespace {

using ::testing::HasSubstr;

class MlaReplay : public ::testing::TestWithParam<std::string> {
 protected:
  MlaReplay() {
    model_ = with_query_heads(find_model("deepseek-v3"), testing::scaled(2, 1));
    config_.model = &model_;
    config_.num_layers = 2;
    config_.max_num_batched_tokens = 700;
    config_.check_rows = 40;
    config_.seed = 3;
    config_.kv_cache_dtype = GetParam();
  }

  static Trace trace(const std::string& settings) {
    return make_synthetic(SyntheticConfig::parse("synthetic:" + settings), 5);
  }
  static Trace any_trace() { return trace("requests=8,prompt=60,output=8,shared=40"); }

  ReplayResult expect_correct(const Trace& trace) {
    const ReplayResult r = replay(trace, config_);
    EXPECT_EQ(r.backend, "FLASH_ATTN_MLA");
    EXPECT_EQ(r.check.rows, config_.check_rows);
    EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
    EXPECT_GT(r.check.worst_error, 0.0);
    EXPECT_EQ(r.counters.finished_requests, static_cast<std::int64_t>(trace.requests.size()));
    return r;
  }
  void expect_caught(std::function<void(CommonMetadata&)> fault) {
    config_.fault_injection = std::move(fault);
    EXPECT_GT(replay(any_trace(), config_).check.failed, 0);
  }

  ModelPreset model_;
  ReplayConfig config_;
};

TEST_P(MlaReplay, ChecksOutAndSharesPrefixes) {
  const ReplayResult r = expect_correct(any_trace());
  EXPECT_GT(r.counters.prefix_hit_tokens, 0);
  const std::int64_t row = GetParam() == "fp8_ds_mla" ? 656 : GetParam() == "auto" ? 1152 : 576;
  EXPECT_EQ(r.block_bytes, r.block_size * row);
}

TEST_P(MlaReplay, ChecksOutForPromptsInPiecesWithContextFromTheCache) {
  if (testing::scaled(1, 0) == 0) GTEST_SKIP() << "long prompts take minutes under a sanitizer";
  config_.check_rows = 16;
  expect_correct(trace("requests=3,prompt=900,output=4,shared=600,spread=0.2"));
}

TEST_P(MlaReplay, ChecksOutWithDraftsAndPreemption) {
  config_.num_speculative_tokens = 3;
  config_.acceptance = 0.6;
  config_.num_blocks = 30;
  const ReplayResult r = expect_correct(trace("requests=10,prompt=60,output=20,shared=40"));
  EXPECT_GT(r.counters.accepted_tokens, 0);
  EXPECT_GT(r.counters.preemptions, 0);
}

TEST_P(MlaReplay, AWrongSlotIsCaught) {
  expect_caught([](CommonMetadata& m) {
    if (m.num_tokens > 1) std::swap(m.slot_mapping[0], m.slot_mapping[1]);
  });
}

TEST_P(MlaReplay, ABlockOfAnotherRequestIsCaught) {
  expect_caught([](CommonMetadata& m) {
    if (m.num_reqs < 2) return;
    auto* table = static_cast<std::int32_t*>(const_cast<void*>(m.block_table.data));
    const std::int64_t row = m.block_table.strides[0];
    std::swap(table[0], table[row + 1]);
  });
}

INSTANTIATE_TEST_SUITE_P(Caches, MlaReplay, ::testing::Values("auto", "fp8_e4m3", "fp8_ds_mla"),
                         [](const auto& info) { return info.param; });

TEST(MlaReplayOfOtherTypes, ChecksOut) {
  const ModelPreset model = with_query_heads(find_model("deepseek-v2-lite"), 2);
  ReplayConfig config;
  config.model = &model;
  config.check_rows = 40;
  for (const DType dtype : {DType::f32, DType::f16}) {
    config.dtype = dtype;
    const ReplayResult r =
        replay(make_synthetic(SyntheticConfig::parse("synthetic:requests=4,prompt=50,output=6"), 1),
               config);
    EXPECT_EQ(r.check.failed, 0) << ::testing::PrintToString(r.check.failures);
  }
}

TEST(MlaReplayOfOtherTypes, Int8CachesAreRefused) {
  const ModelPreset& model = find_model("deepseek-v3");
  ReplayConfig config;
  config.model = &model;
  config.kv_cache_dtype = "int8_level2";
  try {
    replay(make_synthetic(SyntheticConfig::parse("synthetic:requests=1"), 1), config);
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("kv_cache_dtype"));
  }
}

}  // namespace
}  // namespace attend::serving
