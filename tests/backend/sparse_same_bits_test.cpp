// SPDX-License-Identifier: Apache-2.0
// Rows of FLASHMLA_SPARSE do not depend on the strategy, on how a prompt is cut, on neighbours, on
// the workspace or on threads; and with all tokens named they are those of dense decode.
#include <gmock/gmock.h>

#include "attend/core/executor.h"
#include "sparse_layer.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;

const int kPrompt = scaled(500, 150);

void merge(MlaLayer::Rows& all, const MlaLayer::Rows& some) {
  for (const auto& row : some) all.insert(row);
}

MlaLayer::Rows rows_of(const MlaLayer::Rows& all, int id) {
  MlaLayer::Rows own;
  for (const auto& [key, bytes] : all)
    if (key.first == id) own[key] = bytes;
  return own;
}

void expect_same(const MlaLayer::Rows& got, const MlaLayer::Rows& wanted) {
  ASSERT_EQ(got.size(), wanted.size());
  for (const auto& [key, bytes] : wanted)
    ASSERT_EQ(got.at(key), bytes) << "request " << key.first << " position " << key.second;
}

const SparseDecision& decision(const SparseStep& step) {
  return step.metadata->sparse_batch()->decision;
}

TEST(SparseSameBits, OfBothStrategiesAndAnyWorkspace) {
  const auto one = make_thread_pool(1), three = make_thread_pool(3);
  for (const char* stored : {"fp8_ds_mla", "auto"}) {
    SparseSetup setup;
    setup.kv_cache_dtype = stored;
    setup.strategy = SparseStrategy::mixed;
    SparseLayer mixed(setup, *one);
    const std::vector<MlaStepRequest> first = {{0, 0, kPrompt}, {1, 0, 70}, {2, 0, 30}},
                                      second = {{1, 70, 1}, {0, kPrompt, 90}, {3, 0, 40}};
    const auto wanted = mixed.run(first);
    const auto later = mixed.run(second);
    setup.strategy = SparseStrategy::separate;
    // All requests at a time; some of them; one reads the cache because it does not fit.
    for (const std::int64_t rows :
         {std::int64_t{0}, std::int64_t{kPrompt} + 95, std::int64_t{80}}) {
      setup.workspace_tokens = rows;
      for (Executor* executor : {one.get(), three.get()}) {
        SCOPED_TRACE(std::string(stored) + " rows " + std::to_string(rows));
        SparseLayer separate(setup, *executor);
        expect_same(separate.run(first), wanted);
        expect_same(separate.run(second), later);
        EXPECT_EQ(separate.cache.snapshot(), mixed.cache.snapshot());
      }
    }
  }
}

TEST(SparseSameBits, HoweverAPromptIsCut) {
  const auto one = make_thread_pool(1), three = make_thread_pool(3);
  for (const SparseStrategy strategy : {SparseStrategy::mixed, SparseStrategy::separate}) {
    SparseSetup setup;
    setup.strategy = strategy;
    SparseLayer whole(setup, *one), cut(setup, *three);
    const auto wanted = whole.run({{0, 0, kPrompt}});
    const int half = kPrompt / 2;
    auto got = rows_of(cut.run({{1, 0, 40}, {0, 0, half}, {2, 0, 100}}), 0);
    merge(got, rows_of(cut.run({{1, 40, 1}, {0, half, 1}, {2, 100, 60}}), 0));
    merge(got, cut.run({{0, half + 1, kPrompt - half - 1}}));
    expect_same(got, wanted);
  }
}

TEST(SparseSameBits, AreThoseOfDenseDecodeIfAllTokensAreNamedAscending) {
  const auto pool = make_thread_pool(2);
  for (const char* stored : {"fp8_ds_mla", "auto"}) {
    const int prompt = scaled(300, 90);
    SparseSetup setup;
    setup.kv_cache_dtype = stored;
    setup.topk = prompt + 4;
    SparseLayer sparse(setup, *pool);
    sparse.choose = whole_context;
    MlaSetup dense_setup;
    dense_setup.dims = setup.dims;
    dense_setup.kv_cache_dtype = stored;
    dense_setup.decode_threshold = prompt;
    MlaLayer dense(dense_setup, *pool);
    std::memcpy(dense.weight.view().data, sparse.weight.view().data, dense.weight.bytes());
    dense.impl = find_backend("FLASH_ATTN_MLA").make_impl(dense.impl_config());
    // Queries differ between the fixtures: give the dense layer those of the sparse one.
    const auto run_dense = [&](const std::vector<MlaStepRequest>& requests) {
      MlaStep step = dense.prepare(requests);
      step.args.query = *sparse.query;
      step.args.kv_c = *sparse.kv_c;
      step.args.k_pe = *sparse.k_pe;
      dense.impl->forward(step.args, step.metadata.get());
    };
    sparse.run({{0, 0, 1}});
    run_dense({{0, 0, 1}});
    sparse.run({{0, 1, prompt - 1}});
    run_dense({{0, 1, prompt - 1}});
    EXPECT_EQ(sparse.output->snapshot(), dense.output->snapshot()) << stored;
    EXPECT_EQ(sparse.lse->snapshot(), dense.lse->snapshot()) << stored;
  }
}

TEST(SparseStrategies, AreChosenForAReasonThatShows) {
  const auto pool = make_thread_pool(2);
  const auto reason = [&](const SparseSetup& setup, const std::vector<MlaStepRequest>& step) {
    SparseLayer layer(setup, *pool);
    return describe(decision(layer.prepare(step)));
  };
  SparseSetup setup;
  EXPECT_EQ(reason(setup, {{0, 40, 1}, {1, 70, 1}}), "mixed: no request prefills");
  EXPECT_THAT(reason(setup, {{0, 900, 2}}), HasSubstr("mixed: a gather would cost more"));
  setup.topk = 1000;
  EXPECT_THAT(reason(setup, {{0, 0, 900}}), HasSubstr("separate: a gather costs less"));
  setup.workspace_tokens = 899;
  EXPECT_EQ(reason(setup, {{0, 0, 900}}), "mixed: no request that prefills fits the workspace");
  setup.kv_cache_dtype = "auto";
  EXPECT_EQ(reason(setup, {{0, 0, 900}}), "mixed: the cache holds bf16 rows");
  setup.strategy = SparseStrategy::separate;
  EXPECT_EQ(reason(setup, {{0, 0, 900}}), "separate: asked for");
  setup.strategy = SparseStrategy::automatic;
  setup.world_size = 2;
  EXPECT_EQ(reason(setup, {{0, 0, 900}}), "mixed: keys are spread over ranks");
}

TEST(SparseStrategies, HaveNames) {
  for (const auto s : {SparseStrategy::automatic, SparseStrategy::mixed, SparseStrategy::separate})
    EXPECT_EQ(parse_sparse_strategy(to_string(s)), s);
  EXPECT_FALSE(parse_sparse_strategy("both"));
}

}  // namespace
}  // namespace attend::testing
