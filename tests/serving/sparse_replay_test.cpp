// SPDX-License-Identifier: Apache-2.0
// Replays of a model with sparse latent attention: what the indexer chose and every row check out
// in float64, and faults are caught.
#include <gmock/gmock.h>

#include <algorithm>
#include <string>
#include <utility>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "serving/index_check.h"
#include "serving/replay.h"
#include "serving/sparse_layer.h"
#include "serving/synthetic.h"
#include "support/scale.h"

namespace attend::serving {
namespace {

class SparseReplay : public ::testing::TestWithParam<std::string> {
 protected:
  SparseReplay() {
    model_ =
        with_index_topk(with_query_heads(find_model("deepseek-v3.2"), testing::scaled(2, 1)), 24);
    model_.indexer->num_heads = testing::scaled(64, 8);
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
  static Trace any_trace() { return trace("requests=8,prompt=90,output=8,shared=64"); }

  ReplayResult expect_correct(const Trace& trace) {
    const ReplayResult r = replay(trace, config_);
    EXPECT_EQ(r.backend, "FLASHMLA_SPARSE");
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

TEST_P(SparseReplay, ChecksOutAndSharesPrefixes) {
  const ReplayResult r = expect_correct(any_trace());
  EXPECT_EQ(r.block_size, 64);
  EXPECT_GT(r.counters.prefix_hit_tokens, 0);
}

TEST_P(SparseReplay, ChecksOutWithDraftsAndPreemption) {
  config_.num_speculative_tokens = 3;
  config_.acceptance = 0.6;
  config_.num_blocks = 12;
  const ReplayResult r = expect_correct(trace("requests=10,prompt=100,output=20,shared=40"));
  EXPECT_GT(r.counters.accepted_tokens, 0);
  EXPECT_GT(r.counters.preemptions, 0);
}

TEST_P(SparseReplay, ChecksOutWhereEveryTokenIsChosen) {
  model_.indexer->topk = 200;
  expect_correct(any_trace());
}

TEST_P(SparseReplay, AWrongSlotIsCaught) {
  expect_caught([](CommonMetadata& m) {
    if (m.num_tokens > 1) std::swap(m.slot_mapping[0], m.slot_mapping[1]);
  });
}

TEST_P(SparseReplay, ABlockOfAnotherRequestIsCaught) {
  expect_caught([](CommonMetadata& m) {
    if (m.num_reqs < 2) return;
    auto* table = static_cast<std::int32_t*>(const_cast<void*>(m.block_table.data));
    const std::int64_t row = m.block_table.strides[0];
    std::swap(table[0], table[row + 1]);
  });
}

INSTANTIATE_TEST_SUITE_P(Caches, SparseReplay, ::testing::Values("auto", "fp8_ds_mla"),
                         [](const auto& info) { return info.param; });

/// A row whose tokens an indexer chose, and the same with one of them wrong.
TEST(CheckChosen, FindsOneWrongToken) {
  ModelPreset model = with_index_topk(find_model("deepseek-v3.2"), 10);
  model.indexer->num_heads = 4;
  const ValueGenerator generator(7, DType::bf16);
  const auto pool = make_thread_pool(1);
  Request request;
  request.id = 4;
  request.prompt_tokens = 40;
  std::vector<StepToken> tokens(40);
  for (int p = 0; p < 40; ++p) {
    StepToken& t = tokens[static_cast<std::size_t>(p)];
    t.request = &request;
    t.own_content = t.content = own_content_id(request);
    t.position = p;
  }
  BuilderConfig b;
  b.num_q_heads = 1;
  b.cache = {.num_blocks = 1, .block_size = 64, .num_kv_heads = 1, .head_size = 576};
  MlaBuilderConfig& mla = b.mla.emplace();
  mla.dims = *model.mla;
  mla.max_model_len = 64;
  mla.max_num_seqs = 1;
  b.sparse.emplace().topk = 10;
  b.sparse->max_num_batched_tokens = 64;
  CommonMetadata m;
  m.query_start_loc = {0, 40};
  m.seq_lens = {40};
  m.num_reqs = 1;
  m.num_tokens = m.max_query_len = m.max_seq_len = 40;
  for (std::int64_t s = 0; s < 40; ++s) m.slot_mapping.push_back(s);
  const std::int32_t block = 0;
  m.block_table = {&block, DType::i32, {1, 1}};
  const auto metadata = find_backend("FLASHMLA_SPARSE").make_builder(b)->build(0, m);
  SparseLayers layers(model, DType::bf16, {1, 64, 1, 64}, *pool);
  layers.fill(tokens, 0, generator, *pool);
  layers.choose(0, *metadata, *pool);
  SampledRow row;
  row.request = &request;
  row.num_keys = row.first_rejected = 40;
  for (const int position : {5, 9, 10, 25, 39}) {
    row.position = position;
    row.chosen = layers.chosen_row(position);
    EXPECT_EQ(check_chosen(row, model, generator), "") << position;
    if (position < 10) continue;
    SampledRow bad = row;
    // The first token that was left out takes the place of the one behind it.
    for (std::size_t i = 0; i < 10; ++i) {
      if (row.chosen[i] == static_cast<std::int32_t>(i)) continue;
      bad.chosen[i] = static_cast<std::int32_t>(i);
      break;
    }
    if (bad.chosen == row.chosen) bad.chosen[9] = 10;
    EXPECT_NE(check_chosen(bad, model, generator), "") << position;
    bad = row;
    bad.chosen[9] = -1;
    EXPECT_NE(check_chosen(bad, model, generator), "") << position;
    bad = row;
    bad.chosen[1] = bad.chosen[0];
    EXPECT_NE(check_chosen(bad, model, generator), "") << position;
    bad = row;
    bad.layer = 1;
    EXPECT_NE(check_chosen(bad, model, generator), "") << position;
  }
}

TEST(SparseModels, ChooseAnotherNumberOfTokensOnlyIfTheyChoose) {
  EXPECT_EQ(with_index_topk(find_model("deepseek-v3.2"), 7).indexer->topk, 7);
  EXPECT_THROW(with_index_topk(find_model("deepseek-v3"), 7), InvalidArgument);
  EXPECT_THROW(with_index_topk(find_model("deepseek-v3.2"), 0), InvalidArgument);
}

}  // namespace
}  // namespace attend::serving
