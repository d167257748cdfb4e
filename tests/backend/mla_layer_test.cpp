// SPDX-License-Identifier: Apache-2.0
// What a layer of FLASH_ATTN_MLA writes besides its rows: codes, results of a profiling run,
// padding; and how much memory a call takes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/float_types.h"
#include "attend/plan/attention_plan.h"
#include "attend/plan/mla_workspace.h"
#include "backend/allocation_counter.h"
#include "mla_layer.h"

namespace attend::testing {
namespace {

using Steps = std::vector<std::vector<MlaStepRequest>>;

/// Batches that take every path of the layer, each after those that fill its context.
struct Path {
  const char* name;
  Steps before;
  std::vector<MlaStepRequest> step;
};
const Path kPaths[] = {
    {"new tokens alone", {}, {{0, 0, 70}, {1, 0, 300}}},
    {"context below a piece", {{{0, 0, 100}}}, {{0, 100, 30}}},
    {"chunks of context", {{{0, 0, 700}}}, {{0, 700, 30}, {1, 0, 20}}},
    {"decodes", {{{0, 0, 300}}, {{1, 0, 20}}}, {{0, 300, 1}, {1, 20, 1}}},
    {"decodes and prefills", {{{0, 0, 40}}, {{1, 0, 600}}}, {{0, 40, 1}, {1, 600, 20}, {2, 0, 9}}},
};

/// Runs the path; leaves the results in the layer.
void run(MlaLayer& layer, const Path& path, bool wants_lse) {
  for (const auto& step : path.before) layer.run(step);
  const MlaStep step = layer.prepare(path.step);
  ForwardArgs args = step.args;
  if (!wants_lse) args.lse = {};
  layer.impl->forward(args, step.metadata.get());
}

TEST(MlaLayerOutput, OfCodesIsTheOutputOverTheScale) {
  const auto pool = make_thread_pool(3);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    MlaSetup setup;
    setup.dtype = dtype;
    setup.workspace_tokens = 256;
    MlaSetup quantised = setup;
    quantised.quant_output = true;
    for (const Path& path : kPaths) {
      for (const bool wants_lse : {false, true}) {
        SCOPED_TRACE(std::string(path.name) + (wants_lse ? " with lse" : ""));
        MlaLayer layer(setup, *pool), codes(quantised, *pool);
        run(layer, path, wants_lse);
        run(codes, path, wants_lse);
        const float scale = *codes.prepare({{0, 0, 1}}).args.output_scale;
        run(codes, {path.name, {}, path.step}, wants_lse);
        const auto wanted = [&](std::size_t i) {
          const float x = dtype == DType::f32   ? layer.output->as<float>()[i]
                          : dtype == DType::f16 ? to_f32(layer.output->as<f16>()[i])
                                                : to_f32(layer.output->as<bf16>()[i]);
          return to_fp8_e4m3(x / scale).bits;
        };
        const auto got = codes.output->as<fp8_e4m3>();
        for (std::size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i].bits, wanted(i)) << i;
        EXPECT_EQ(codes.lse->snapshot(), layer.lse->snapshot());
      }
    }
  }
}

TEST(MlaLayerOutput, MayBeNumbersThoughCodesWereAnnounced) {
  const auto pool = make_thread_pool(2);
  MlaSetup setup;
  MlaSetup quantised;
  quantised.quant_output = true;
  for (const Path& path : kPaths) {
    MlaLayer layer(setup, *pool), announced(setup, *pool), codes(quantised, *pool);
    announced.builder = std::move(codes.builder);
    run(layer, path, true);
    run(announced, path, true);
    EXPECT_EQ(announced.output->snapshot(), layer.output->snapshot()) << path.name;
  }
}

TEST(MlaLayerProfiling, GivesRowsWithoutKeys) {
  const auto pool = make_thread_pool(2);
  for (const bool quant_output : {false, true}) {
    MlaSetup setup;
    setup.quant_output = quant_output;
    MlaLayer layer(setup, *pool);
    ForwardArgs args = layer.args({{0, 0, 5}});
    const auto cache = layer.cache.snapshot();
    // Every other row and all but the last columns.
    const std::size_t element = size_of(args.output.dtype);
    args.output.shape[0] = 2;
    args.output.strides[0] *= 2;
    args.output = args.output.slice(2, 0, 24);
    args.lse.shape[0] = 2;
    args.lse.strides[0] *= 2;
    layer.impl->forward(args, nullptr);
    for (std::int64_t t = 0; t < 5; ++t) {
      const bool written = t == 0 || t == 2;
      const auto* row = static_cast<const unsigned char*>(layer.output->view().select(0, t).data);
      for (std::size_t i = 0; i < 3 * 24 * element; ++i) ASSERT_EQ(row[i], written ? 0 : 0xff);
      for (int h = 0; h < 3; ++h) {
        const double lse = get(*layer.lse, {t, h});
        EXPECT_TRUE(written ? lse == -std::numeric_limits<double>::infinity() : lse != lse);
      }
    }
    EXPECT_EQ(layer.cache.snapshot(), cache);
    args.lse = {};
    EXPECT_NO_THROW(layer.impl->forward(args, nullptr));
  }
}

TEST(MlaLayerPadding, IsNeitherReadNorWritten) {
  const auto pool = make_thread_pool(2);
  for (const bool quant_output : {false, true}) {
    MlaSetup setup;
    setup.quant_output = quant_output;
    setup.workspace_tokens = 256;
    const std::vector<MlaStepRequest> requests = {{0, 40, 1}, {1, 600, 20}};
    MlaLayer exact(setup, *pool), padded(setup, *pool);
    for (MlaLayer* layer : {&exact, &padded}) layer->run({{0, 0, 40}, {1, 0, 600}});
    exact.run(requests);
    // Five more rows, a request more in the table and garbage behind the batch's fields.
    MlaStep step = padded.prepare({{0, 40, 1}, {1, 600, 20}, {2, 0, 5}});
    CommonMetadata batch = padded.batch(requests);
    batch.block_table = step.block_table;
    batch.slot_mapping.resize(30, -7);
    batch.seq_lens.push_back(-3);
    batch.query_start_loc.push_back(1000);
    step.metadata = padded.builder->build(0, batch);
    for (HostTensor* t : {padded.query.get(), padded.kv_c.get(), padded.k_pe.get()})
      for (std::int64_t row = 21; row < 26; ++row)
        std::memset(t->view().select(0, row).data, 0xff,
                    t->bytes() / static_cast<std::size_t>(t->view().shape[0]));
    padded.workspace.reserve(step.metadata->workspace_bytes());
    step.args.workspace = padded.workspace.workspace();
    padded.impl->forward(step.args, step.metadata.get());
    for (const auto& [got, wanted] : {std::pair{padded.output.get(), exact.output.get()},
                                      {padded.lse.get(), exact.lse.get()}}) {
      const auto bytes = got->snapshot(), exactly = wanted->snapshot();
      EXPECT_TRUE(std::equal(exactly.begin(), exactly.end(), bytes.begin()));
      EXPECT_TRUE(std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(exactly.size()),
                              bytes.end(), [](unsigned char b) { return b == 0xff; }));
    }
    EXPECT_EQ(padded.cache.snapshot(), exact.cache.snapshot());
  }
}

TEST(MlaLayerTables, CanBeThoseOfAnotherGroup) {
  const auto pool = make_thread_pool(2);
  MlaSetup setup;
  setup.workspace_tokens = 256;
  const Steps steps = {{{0, 0, 600}, {1, 0, 30}}, {{1, 30, 1}, {0, 600, 20}}};
  MlaLayer one(setup, *pool), other(setup, *pool);
  // The other group's blocks lie elsewhere.
  std::ranges::reverse(other.block_table.as<std::int32_t>());
  for (const auto& requests : steps) {
    const MlaStep own = one.prepare(requests), updated = other.prepare(requests);
    const auto metadata = one.builder->update_block_table(*own.metadata, updated.block_table,
                                                          updated.batch.slot_mapping);
    EXPECT_EQ(metadata->workspace_bytes(), own.metadata->workspace_bytes());
    one.impl->forward(own.args, own.metadata.get());
    other.impl->forward(updated.args, metadata.get());
    EXPECT_EQ(other.output->snapshot(), one.output->snapshot());
    EXPECT_EQ(other.lse->snapshot(), one.lse->snapshot());
  }
  EXPECT_NE(other.cache.snapshot(), one.cache.snapshot());
}

TEST(MlaLayerTables, WithoutSlotsNothingIsWritten) {
  const auto pool = make_thread_pool(2);
  MlaLayer layer({}, *pool);
  const std::vector<MlaStepRequest> requests = {{0, 0, 30}};
  const MlaLayer::Rows wanted = layer.run(requests);
  const auto cache = layer.cache.snapshot();
  MlaStep step = layer.prepare(requests);
  const auto metadata = layer.builder->update_block_table(*step.metadata, step.block_table, {});
  layer.kv_c->fill_bytes(0xff);
  layer.impl->forward(step.args, metadata.get());
  EXPECT_EQ(layer.cache.snapshot(), cache);
  const auto output = layer.output->snapshot();
  step.args.kv_c = step.args.k_pe = {};  // they are in the cache
  layer.output->fill_bytes(0xff);
  layer.impl->forward(step.args, step.metadata.get());
  EXPECT_EQ(layer.output->snapshot(), output);
  EXPECT_EQ(layer.cache.snapshot(), cache);
  EXPECT_TRUE(std::equal(output.begin(), output.begin() + 144, wanted.at({0, 0}).begin()));
}

TEST(MlaLayerTables, ABatchWithoutRequestsDoesNothing) {
  const auto pool = make_thread_pool(1);
  MlaLayer layer({}, *pool);
  EXPECT_TRUE(layer.run({}).empty());
}

TEST(MlaLayerMemory, ACallAllocatesNothing) {
  const auto pool = make_thread_pool(3);
  for (const char* cache : {"auto", "fp8_e4m3", "fp8_ds_mla"}) {
    for (const bool quant_output : {false, true}) {
      MlaSetup setup;
      if (std::string(cache) == "fp8_ds_mla") setup.dims = {512, 32, 64, 24};
      setup.kv_cache_dtype = cache;
      setup.quant_output = quant_output;
      setup.workspace_tokens = 256;
      for (const Path& path : kPaths) {
        MlaLayer layer(setup, *pool);
        run(layer, path, true);
        const MlaStep step = layer.prepare(path.step);
        const std::size_t before = num_allocations();
        layer.impl->forward(step.args, step.metadata.get());
        EXPECT_EQ(num_allocations(), before) << path.name << " " << cache;
      }
    }
  }
}

constexpr int kHeads = 16;
constexpr MlaDims kDeepSeek{512, 128, 64, 128};

/// Workspace of a step with 4 new tokens behind a context.
std::size_t workspace_of(int context, int decode_threshold, int workers, bool quant_output) {
  BuilderConfig c;
  c.num_q_heads = kHeads;
  c.cache.num_blocks = 1 << 20;
  c.cache.block_size = 64;
  c.cache.num_kv_heads = 1;
  c.cache.head_size = kDeepSeek.cache_dim();
  c.num_workers = workers;
  MlaBuilderConfig& mla = c.mla.emplace();
  mla.dims = kDeepSeek;
  mla.max_model_len = 1 << 18;
  mla.max_num_seqs = 256;
  mla.decode_threshold = decode_threshold;
  mla.quant_output = quant_output;
  const HostTensor table(DType::i32, {1, (context + 4 + 63) / 64});
  CommonMetadata m;
  m.query_start_loc = {0, 4};
  m.seq_lens = {context + 4};
  m.num_reqs = 1;
  m.num_tokens = m.max_query_len = 4;
  m.max_seq_len = context + 4;
  m.block_table = table;
  return find_backend("FLASH_ATTN_MLA").make_builder(c)->build(0, m)->workspace_bytes();
}

TEST(MlaLayerMemory, DoesNotGrowWithTheContext) {
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  // A chunk's gathered rows, keys and values in bf16.
  constexpr std::size_t kChunk = static_cast<std::size_t>(kMlaMostWorkspaceTokens) * 2 *
                                 (512 + 64 + kHeads * (128 + 64 + 128));
  // In f32 a token's carried row for each head, with a maximum and a sum.
  constexpr std::size_t kState = 4 * kHeads * (128 + 2) * 4;
  for (const int workers : {1, 16, 64}) {
    for (const bool quant_output : {false, true}) {
      SCOPED_TRACE(workers);
      const std::size_t bytes = workspace_of(32768, 1, workers, quant_output);
      EXPECT_GE(bytes, kChunk + kState);
      EXPECT_LT(bytes, 120 * kMiB);
      EXPECT_EQ(workspace_of(131072, 1, workers, quant_output), bytes);
      // What a plan asks for and rows before they are quantised.
      EXPECT_LT(workspace_of(32768, 1, 1, quant_output), kChunk + kState + 4 * kMiB);
      const std::size_t decode = workspace_of(32768, 0, workers, quant_output);
      // Scratch of each worker, most of it.
      EXPECT_LT(decode, static_cast<std::size_t>(workers) * 3 * kMiB);
      EXPECT_EQ(workspace_of(131072, 0, workers, quant_output), decode);
    }
  }
}

}  // namespace
}  // namespace attend::testing
