// SPDX-License-Identifier: Apache-2.0
// The indexer of a layer: what it chooses is what one call over all keys would choose, whatever the
// budgets, the batch and the threads are.
#include <gmock/gmock.h>

#include "attend/core/error.h"
#include "attend/ops/indexer.h"
#include "attend/ops/indexer_logits.h"
#include "attend/ops/top_k.h"
#include "backends/flashmla_sparse/indexer_steps.h"
#include "sparse_indexer_bench.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;

constexpr int kHeads = IndexerBench::kHeads, kTopk = IndexerBench::kTopk;
using Budgets = IndexerBench::Budgets;

const int kPrompt = scaled(400, 100);

/// One request by the ops alone: all keys, all logits.
IndexerBench::Rows by_hand(IndexerBench& bench, int id) {
  const auto metadata = bench.layer.prepare({{id, 0, kPrompt}}).metadata;
  const SparseIndexerArgs a = bench.args({{id, 0, kPrompt}}, *metadata);
  const SparseIndexerConfig& c = bench.indexer.config();
  HostTensor codes(DType::fp8_e4m3, {kPrompt, kHeads, 128}), weights(DType::f32, {kPrompt, kHeads}),
      keys(DType::bf16, {kPrompt, 128}), cache(DType::u8, {1, kPrompt, 132}),
      slots(DType::i64, {kPrompt}), logits(DType::f32, {kPrompt, kPrompt}),
      scales(DType::f32, {kPrompt}), starts(DType::i32, {kPrompt}), ends(DType::i32, {kPrompt}),
      chosen(DType::i32, {kPrompt, kTopk});
  for (int t = 0; t < kPrompt; ++t) {
    slots.as<std::int64_t>()[static_cast<std::size_t>(t)] = t;
    ends.as<std::int32_t>()[static_cast<std::size_t>(t)] = t + 1;
  }
  PrepareIndexerArgs p;
  p.q = a.q;
  p.k = a.k;
  p.weights = a.weights;
  p.positions = a.positions;
  p.cos_sin_cache = c.cos_sin_cache;
  p.k_norm_weight = {c.k_norm_weight.data(), DType::f32, {128}};
  p.k_norm_bias = {c.k_norm_bias.data(), DType::f32, {128}};
  p.q_codes = codes;
  p.weights_out = weights;
  p.k_out = keys;
  prepare_indexer(p);
  indexer_k_quant_and_cache({keys, cache, slots, IndexerScale::ue8m0});
  auto* bytes = static_cast<std::uint8_t*>(cache.view().data);
  std::memcpy(scales.view().data, bytes + std::ptrdiff_t{kPrompt} * 128, scales.bytes());
  Fp8MqaLogitsArgs l;
  l.q = codes;
  l.k = {bytes, DType::fp8_e4m3, {kPrompt, 128}};
  l.k_scale = scales;
  l.weights = weights;
  l.ks = starts;
  l.ke = ends;
  l.logits = logits;
  fp8_mqa_logits(l);
  top_k_per_row_prefill({logits, starts, ends, chosen});
  IndexerBench::Rows rows;
  for (int t = 0; t < kPrompt; ++t) {
    const auto* row = chosen.view().select(0, t).as<std::int32_t>();
    rows[{id, t}].assign(row, row + kTopk);
  }
  return rows;
}

void merge(IndexerBench::Rows& all, const IndexerBench::Rows& some, int id) {
  for (const auto& row : some)
    if (row.first.first == id) all.insert(row);
}

TEST(SparseIndexer, ChoosesWhatOneCallOverAllKeysDoes) {
  const auto one = make_thread_pool(1), three = make_thread_pool(3);
  IndexerBench first(*one, {});
  const IndexerBench::Rows wanted = by_hand(first, 0);
  const std::int64_t row_bytes = SparseLayer::kMaxTokens * 4;
  // All at once; few logits; few keys, so that requests read pages; both.
  for (const Budgets& b :
       {Budgets{}, Budgets{0, row_bytes}, Budgets{130, 3 * row_bytes}, Budgets{10, row_bytes}}) {
    for (Executor* executor : {one.get(), three.get()}) {
      SCOPED_TRACE(std::to_string(b.keys) + " keys " + std::to_string(b.logits_bytes));
      IndexerBench bench(*executor, b);
      const int half = kPrompt / 2;
      auto got = bench.run({{1, 0, 40}, {0, 0, half}, {2, 0, 60}});
      IndexerBench::Rows own;
      merge(own, got, 0);
      // Decodes of four tokens and of one, short and long, then the rest.
      merge(own, bench.run({{1, 40, 4}, {0, half, 4}, {2, 60, 1}, {3, 0, 90}}), 0);
      merge(own, bench.run({{1, 44, 1}, {0, half + 4, 1}, {3, 90, 1}}), 0);
      merge(own, bench.run({{4, 0, 3}, {0, half + 5, kPrompt - half - 5}}), 0);
      EXPECT_EQ(own, wanted);
    }
  }
}

TEST(SparseIndexer, FillsTheRestWithNothing) {
  const auto pool = make_thread_pool(2);
  IndexerBench bench(*pool, {});
  const auto rows = bench.run({{0, 0, 30}});
  std::vector<std::int32_t> wanted(kTopk, -1);
  for (int i = 0; i < 8; ++i) wanted[static_cast<std::size_t>(i)] = i;
  EXPECT_EQ(rows.at({0, 7}), wanted);
  for (std::int64_t t = 30; t < 32; ++t) EXPECT_EQ(get(*bench.chosen, {t, 5}), -1);
  SparseStep step = bench.layer.prepare({{0, 0, 30}});
  const SparseIndexerArgs a = bench.args({{0, 0, 30}}, *step.metadata);
  bench.indexer.forward(a, nullptr);
  for (const std::int32_t i : bench.chosen->as<std::int32_t>()) ASSERT_EQ(i, -1);
}

TEST(SparseIndexerSteps, KeepTheBudgets) {
  // Two decodes of one token, one of three, a short one, a prompt, one without queries and another.
  const std::vector<std::int32_t> starts = {0, 1, 2, 5, 6, 206, 206, 306},
                                  lens = {100, 300, 90, 20, 200, 50, 150};
  const flashmla_sparse::Requests requests{7, starts, lens};
  for (const std::int64_t keys : {100, 200, 350}) {
    for (const std::int64_t logits : {300, 1000, 1 << 20}) {
      const auto steps = flashmla_sparse::cut_indexer(
          requests, {.topk = 20, .first_prefill = 4, .max_keys = keys, .max_logits = logits});
      EXPECT_LE(steps.most_keys, keys);
      EXPECT_LE(steps.most_logits, logits);
      std::int64_t rows = 0;
      for (const auto& step : steps.steps)
        for (const auto& chunk : step.chunks) {
          rows += chunk.num_tokens();
          EXPECT_EQ(chunk.num_tokens() % chunk.num_requests(), 0);
          EXPECT_LE(chunk.logits(), logits);
        }
      EXPECT_EQ(rows, 1 + 1 + 3 + 180 + 100);
    }
  }
}

struct BadCall {
  const char* argument;
  std::function<void(SparseIndexerArgs&)> change;
};

TEST(SparseIndexerErrors, NameTheArgumentAndWriteNothing) {
  const auto pool = make_thread_pool(1);
  IndexerBench bench(*pool, {});
  SparseStep step = bench.layer.prepare({{0, 0, 50}});
  using A = SparseIndexerArgs;
  const BadCall bad[] = {
      {"q", [](A& a) { a.q.shape[1] = 100; }},
      {"q", [](A& a) { a.q.dtype = DType::i32; }},
      {"k", [](A& a) { a.k.dtype = DType::f16; }},
      {"k", [](A& a) { a.k.shape[0] = 49; }},
      {"weights", [](A& a) { a.weights.shape[1] = 3; }},
      {"positions", [](A& a) { a.positions.dtype = DType::i32; }},
      {"cache", [](A& a) { a.cache.shape[2] = 128; }},
      {"cache", [](A& a) { a.cache.shape[1] = 32; }},
      {"cache", [](A& a) { a.cache.shape[0] = 60; }},
      {"topk_indices", [](A& a) { a.topk_indices.shape[1] = kTopk - 1; }},
      {"topk_indices", [](A& a) { a.topk_indices.shape[0] = 49; }},
      {"topk_indices", [](A& a) { a.topk_indices.dtype = DType::i64; }},
      {"topk_indices", [](A& a) { a.topk_indices.data = const_cast<void*>(a.q.data); }},
      {"workspace", [](A& a) { a.workspace.size = 100; }},
  };
  for (const auto& b : bad) {
    SparseIndexerArgs a = bench.args({{0, 0, 50}}, *step.metadata);
    b.change(a);
    const auto cache = bench.cache.snapshot(), chosen = bench.chosen->snapshot();
    try {
      bench.indexer.forward(a, step.metadata.get());
      ADD_FAILURE() << b.argument;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), b.argument) << e.what();
    }
    EXPECT_EQ(bench.cache.snapshot(), cache);
    EXPECT_EQ(bench.chosen->snapshot(), chosen);
  }
  SparseIndexerConfig c = bench.indexer.config();
  c.topk = 0;
  EXPECT_THROW(SparseIndexer{c}, InvalidArgument);
  c = bench.indexer.config();
  c.k_norm_bias.pop_back();
  EXPECT_THROW(SparseIndexer{c}, InvalidArgument);
}

TEST(SparseIndexerErrors, LogitsOfARowMustFitTheBudget) {
  const auto pool = make_thread_pool(1);
  BuilderConfig c = SparseLayer({}, *pool).builder_config();
  c.sparse->max_logits_bytes = SparseLayer::kMaxTokens * 4 - 1;
  try {
    (void)find_backend("FLASHMLA_SPARSE").make_builder(c);
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_THAT(e.what(), HasSubstr("sparse.max_logits_bytes"));
  }
}

}  // namespace
}  // namespace attend::testing
