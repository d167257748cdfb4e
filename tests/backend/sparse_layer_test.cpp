// SPDX-License-Identifier: Apache-2.0
// What a layer of FLASHMLA_SPARSE and its builder make besides rows: persistent buffers, codes,
// profiling runs, padding, tables of other groups.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attend/dist/communicator.h"
#include "attend/ops/flash_mla.h"
#include "backend/allocation_counter.h"
#include "sparse_layer.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

TEST(SparseBuilder, SaysWhoseATokenIsInBuffersThatStay) {
  const auto pool = make_thread_pool(2);
  SparseLayer layer({}, *pool);
  const auto requests = [](const Metadata& m) {
    const ConstTensorView& ids = m.sparse_batch()->req_id_per_token;
    return std::vector<std::int32_t>(ids.as<std::int32_t>(), ids.as<std::int32_t>() + ids.numel());
  };
  SparseStep step = layer.prepare({{0, 5, 2}, {1, 0, 0}, {2, 0, 3}});
  EXPECT_EQ(requests(*step.metadata), (std::vector<std::int32_t>{0, 0, 2, 2, 2}));
  const SparseBatch first = *step.metadata->sparse_batch();
  step.metadata.reset();
  step.metadata = layer.prepare({{0, 7, 1}, {2, 3, 1}}).metadata;
  EXPECT_EQ(requests(*step.metadata), (std::vector<std::int32_t>{0, 1}));
  const SparseBatch& second = *step.metadata->sparse_batch();
  EXPECT_EQ(second.req_id_per_token.data, first.req_id_per_token.data);
  EXPECT_EQ(second.tile_scheduler_metadata.data, first.tile_scheduler_metadata.data);
  EXPECT_EQ(second.num_splits.data, first.num_splits.data);
  // While one lives, the next has others.
  const auto third = layer.prepare({{3, 0, 4}}).metadata;
  EXPECT_NE(third->sparse_batch()->req_id_per_token.data, second.req_id_per_token.data);
  EXPECT_EQ(requests(*step.metadata), (std::vector<std::int32_t>{0, 1}));
}

TEST(SparseBuilder, SchedulesAllTokensAsOneRequestOfTopkKeys) {
  const auto pool = make_thread_pool(2);
  SparseSetup setup;
  setup.topk = 300;
  SparseLayer layer(setup, *pool);
  BuilderConfig config = layer.builder_config();
  config.sparse->num_processors = 132;
  config.num_q_heads = 64;
  const auto builder = find_backend("FLASHMLA_SPARSE").make_builder(config);
  for (const int tokens : {1, 5, 200}) {
    SparseStep step = layer.prepare({{0, 0, tokens}});
    const auto metadata = builder->build(0, step.batch);
    const SparseBatch& b = *metadata->sparse_batch();
    const int parts = mla_num_sm_parts(132, 64, 1, tokens);
    ASSERT_EQ(b.tile_scheduler_metadata.shape[0], parts);
    HostTensor wanted(DType::i32, {parts, 8}), splits(DType::i32, {2}), keys(DType::i32, {1});
    keys.as<std::int32_t>()[0] = 300;
    get_mla_metadata({keys, wanted, splits});
    EXPECT_EQ(std::memcmp(b.tile_scheduler_metadata.data, wanted.view().data, wanted.bytes()), 0);
    EXPECT_EQ(std::memcmp(b.num_splits.data, splits.view().data, splits.bytes()), 0);
    EXPECT_EQ(b.cache_lens.as<std::int32_t>()[0], SparseLayer::kMaxTokens);
  }
}

TEST(SparseBuilder, PlainCachesHaveNoSchedule) {
  const auto pool = make_thread_pool(1);
  SparseSetup setup;
  setup.kv_cache_dtype = "auto";
  SparseLayer layer(setup, *pool);
  EXPECT_FALSE(layer.prepare({{0, 0, 3}}).metadata->sparse_batch()->num_splits.defined());
}

TEST(SparseLayerIndices, WithoutAKeyGiveZeroAndMinusInfinity) {
  const auto pool = make_thread_pool(2);
  for (const auto strategy : {SparseStrategy::mixed, SparseStrategy::separate}) {
    SparseSetup setup;
    setup.strategy = strategy;
    SparseLayer layer(setup, *pool);
    layer.choose = [](int, int position, int topk) {
      std::vector<std::int32_t> none(static_cast<std::size_t>(topk), -1);
      const std::int32_t bad[] = {std::numeric_limits<std::int32_t>::min(),
                                  std::numeric_limits<std::int32_t>::max(), position + 1, 1 << 20};
      std::ranges::copy(bad, none.begin());
      if (position == 2) none[7] = 2;
      return none;
    };
    layer.run({{0, 0, 30}, {1, 0, 4}});
    for (std::int64_t t = 0; t < 34; ++t) {
      const bool has_key = t == 2 || t == 32;
      for (int h = 0; h < 3; ++h) {
        EXPECT_EQ(std::isinf(get(*layer.lse, {t, h})), !has_key) << t;
        EXPECT_EQ(get(*layer.output, {t, h, 0}) == 0.0, !has_key) << t;
      }
    }
  }
}

TEST(SparseLayerOutput, OfCodesIsTheOutputOverTheScale) {
  const auto pool = make_thread_pool(2);
  SparseSetup setup, quantised;
  quantised.quant_output = true;
  SparseLayer layer(setup, *pool), codes(quantised, *pool);
  layer.run({{0, 0, 40}});
  codes.run({{0, 0, 40}});
  const auto numbers = layer.output->as<bf16>();
  const auto got = codes.output->as<fp8_e4m3>();
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_EQ(got[i].bits, to_fp8_e4m3(to_f32(numbers[i]) / 0.05F).bits) << i;
  EXPECT_EQ(codes.lse->snapshot(), layer.lse->snapshot());
}

TEST(SparseLayerProfiling, GivesZeros) {
  const auto pool = make_thread_pool(1);
  SparseLayer layer({}, *pool);
  ForwardArgs args = layer.args({{0, 0, 5}});
  const auto cache = layer.cache.snapshot();
  layer.impl->forward(args, nullptr);
  const auto bytes = layer.output->snapshot();
  EXPECT_TRUE(std::ranges::all_of(bytes, [](unsigned char b) { return b == 0; }));
  EXPECT_EQ(get(*layer.lse, {4, 2}), -std::numeric_limits<double>::infinity());
  EXPECT_EQ(layer.cache.snapshot(), cache);
}

TEST(SparseLayerPadding, IsNeitherReadNorWritten) {
  const auto pool = make_thread_pool(2);
  const std::vector<MlaStepRequest> requests = {{0, 40, 1}, {1, 100, 20}};
  SparseLayer exact({}, *pool), padded({}, *pool);
  for (SparseLayer* layer : {&exact, &padded}) layer->run({{0, 0, 40}, {1, 0, 100}});
  exact.run(requests);
  // Five more rows, a request more in the table and garbage behind the batch's fields.
  SparseStep step = padded.prepare({{0, 40, 1}, {1, 100, 20}, {2, 0, 5}});
  CommonMetadata batch = padded.batch(requests);
  batch.block_table = step.block_table;
  batch.slot_mapping.resize(30, -7);
  batch.seq_lens.push_back(-3);
  batch.query_start_loc.push_back(1000);
  step.metadata = padded.builder->build(0, batch);
  padded.workspace.reserve(step.metadata->workspace_bytes());
  step.args.workspace = padded.workspace.workspace();
  padded.impl->forward(step.args, step.metadata.get());
  for (const auto& [got, wanted] :
       {std::pair{padded.output.get(), exact.output.get()}, {padded.lse.get(), exact.lse.get()}}) {
    const auto bytes = got->snapshot(), exactly = wanted->snapshot();
    EXPECT_TRUE(std::equal(exactly.begin(), exactly.end(), bytes.begin()));
    EXPECT_TRUE(std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(exactly.size()),
                            bytes.end(), [](unsigned char b) { return b == 0xff; }));
  }
  EXPECT_EQ(padded.cache.snapshot(), exact.cache.snapshot());
}

TEST(SparseLayerTables, CanBeThoseOfAnotherGroup) {
  const auto pool = make_thread_pool(2);
  SparseSetup setup;
  setup.strategy = SparseStrategy::separate;
  SparseLayer one(setup, *pool), other(setup, *pool);
  std::ranges::reverse(other.block_table.as<std::int32_t>());
  for (const std::vector<MlaStepRequest>& requests :
       {std::vector<MlaStepRequest>{{0, 0, 200}, {1, 0, 30}}, {{1, 30, 1}, {0, 200, 20}}}) {
    const SparseStep own = one.prepare(requests), updated = other.prepare(requests);
    const auto metadata = one.builder->update_block_table(*own.metadata, updated.block_table,
                                                          updated.batch.slot_mapping);
    one.impl->forward(own.args, own.metadata.get());
    other.impl->forward(updated.args, metadata.get());
    EXPECT_EQ(other.output->snapshot(), one.output->snapshot());
    EXPECT_EQ(other.lse->snapshot(), one.lse->snapshot());
  }
  EXPECT_NE(other.cache.snapshot(), one.cache.snapshot());
}

TEST(SparseLayerMemory, ACallAllocatesNothing) {
  const auto pool = make_thread_pool(3);
  for (const auto strategy : {SparseStrategy::mixed, SparseStrategy::separate}) {
    SparseSetup setup;
    setup.strategy = strategy;
    SparseLayer layer(setup, *pool);
    layer.run({{0, 0, 100}});
    const SparseStep step = layer.prepare({{0, 100, 1}, {1, 0, 70}});
    const std::size_t before = num_allocations();
    layer.impl->forward(step.args, step.metadata.get());
    EXPECT_EQ(num_allocations(), before) << to_string(strategy);
  }
}

TEST(SparseLayerMemory, QueriesOfAllTokensNeverLieInMemoryAtOnce) {
  const auto pool = make_thread_pool(1);
  SparseLayer layer({}, *pool);
  BuilderConfig config = layer.builder_config();
  config.num_q_heads = 128;
  const auto builder = find_backend("FLASHMLA_SPARSE").make_builder(config);
  SparseStep step = layer.prepare({{0, 0, 1000}});
  // Absorbed queries and latents of all would take 265 MiB.
  EXPECT_LT(builder->build(0, step.batch)->workspace_bytes(), std::size_t{80} << 20);
}

TEST(SparseLayerContextParallel, AgreesWithOneRank) {
  const std::vector<std::vector<MlaStepRequest>> steps = {{{0, 0, 90}, {1, 0, 20}},
                                                          {{1, 20, 1}, {0, 90, 5}}};
  for (const auto& [ranks, interleave] : {std::pair{2, 1}, {4, 64}, {3, 16}}) {
    SCOPED_TRACE(std::to_string(ranks) + " ranks, " + std::to_string(interleave));
    run_in_process(ranks, [&, n = ranks, i = interleave](Communicator& comm) {
      const auto pool = make_thread_pool(1);
      SparseSetup setup;
      setup.heads = 2;
      setup.head_group = comm.rank();
      SparseLayer alone(setup, *pool);
      setup.world_size = n;
      setup.rank = comm.rank();
      setup.interleave = i;
      SparseLayer spread(setup, *pool);
      for (const auto& step : steps) {
        spread.run(step, &comm);
        alone.run(step);
        const auto out = spread.output->as<bf16>(), wanted = alone.output->as<bf16>();
        for (std::size_t k = 0; k < out.size(); ++k)
          ASSERT_NEAR(to_f32(out[k]), to_f32(wanted[k]), 0.02) << k;
        const auto lse = spread.lse->as<float>(), wanted_lse = alone.lse->as<float>();
        for (std::size_t k = 0; k < lse.size(); ++k) ASSERT_NEAR(lse[k], wanted_lse[k], 1e-4) << k;
      }
    });
  }
}

TEST(SparseLayerContextParallel, ARankWithoutAChosenTokenAddsNothing) {
  run_in_process(2, [&](Communicator& comm) {
    const auto pool = make_thread_pool(1);
    SparseSetup setup;
    setup.heads = 2;
    setup.head_group = setup.rank = comm.rank();
    setup.world_size = 2;
    SparseLayer layer(setup, *pool);
    // Even tokens are on rank 0: rank 1 has nothing for any of them, nobody anything for token 3.
    layer.choose = [](int, int position, int topk) {
      std::vector<std::int32_t> chosen(static_cast<std::size_t>(topk), -1);
      if (position != 3) chosen[5] = position / 2 * 2;
      return chosen;
    };
    layer.run({{0, 0, 8}}, &comm);
    for (std::int64_t t = 0; t < 8; ++t) {
      EXPECT_EQ(std::isinf(get(*layer.lse, {t, 1})), t == 3);
      const double x = get(*layer.output, {t, 1, 0});
      EXPECT_TRUE(t == 3 ? x == 0.0 : std::isfinite(x) && x != 0.0) << t;
    }
  });
}

}  // namespace
}  // namespace attend::testing
