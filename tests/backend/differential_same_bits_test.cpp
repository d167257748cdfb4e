// SPDX-License-Identifier: Apache-2.0
// A row of a differential layer has the same bits however its batch is made.
#include <gmock/gmock.h>

#include <functional>

#include "attend/backend/selector.h"
#include "attend/batch/fast_prefill.h"
#include "attend/core/error.h"
#include "backend/allocation_counter.h"
#include "backend/differential_step.h"

namespace attend {
namespace {

using testing::as_differential;
using testing::DifferentialOptions;
using testing::DifferentialPart;
using testing::DifferentialStep;
using testing::HostTensor;
using ::testing::IsEmpty;
using ::testing::SizeIs;

const Backend& backend() { return find_backend("DIFFERENTIAL_FLASH_ATTN"); }

void expect_same(const DifferentialStep& a, const DifferentialStep& b) {
  EXPECT_EQ(a.output.snapshot(), b.output.snapshot());
  EXPECT_EQ(a.lse.snapshot(), b.lse.snapshot());
  EXPECT_EQ(a.cache_memory.snapshot(), b.cache_memory.snapshot());
}

struct Feature {
  const char* name;
  std::function<void(DifferentialOptions&)> set;
};

class DifferentialSameBits : public ::testing::TestWithParam<Feature> {
 protected:
  static DifferentialOptions options(std::vector<int> query_lens, std::vector<int> context_lens) {
    DifferentialOptions o;
    o.query_lens = std::move(query_lens);
    o.context_lens = std::move(context_lens);
    GetParam().set(o);
    return o;
  }
};

TEST_P(DifferentialSameBits, PrefillInChunks) {
  const auto o = options({600, 90}, {0, 40});
  DifferentialStep whole(o), chunks(o);
  whole.run();
  chunks.run_parts({{0, 0, 7}});
  chunks.run_parts({{1, 0, 89}, {0, 7, 300}});
  chunks.run_parts({{0, 300, 599}, {1, 89, 90}});
  chunks.run_parts({{0, 599, 600}});
  expect_same(whole, chunks);
}

TEST_P(DifferentialSameBits, DecodesOfSeveralTokens) {
  auto o = options({5, 3, 5}, {700, 256, 9});
  DifferentialStep many(o), single(o);
  many.builder_config.num_speculative_tokens = 4;
  const auto metadata = many.build();
  EXPECT_EQ(as_differential(*metadata).split.num_decodes, 3);
  many.forward(*metadata);
  for (int t = 0; t < 5; ++t) {
    std::vector<DifferentialPart> parts;
    for (int r = 0; r < 3; ++r)
      if (t < o.query_lens[static_cast<std::size_t>(r)]) parts.push_back({r, t, t + 1});
    single.run_parts(parts);
  }
  expect_same(many, single);
}

TEST_P(DifferentialSameBits, WorkersAndSplits) {
  auto o = options({1, 30}, {1500, 800});
  DifferentialStep one(o);
  one.run();
  o.num_workers = 3;
  for (const int splits : {0, 1, 2}) {
    DifferentialStep other(o);
    other.builder_config.max_num_splits = splits;
    other.run();
    expect_same(one, other);
  }
}

TEST_P(DifferentialSameBits, CascadesOverASharedPrefix) {
  auto o = options({1, 1, 3, 1, 20}, {700, 900, 640, 650, 1000});
  o.shared_keys = 640;
  DifferentialStep flat(o), cascade(o);
  flat.builder_config.cascade = CascadeMode::off;
  flat.run();
  cascade.builder_config.cascade = CascadeMode::always;
  const auto metadata = cascade.build(640);
  ASSERT_THAT(as_differential(*metadata).cascade.prefixes, SizeIs(1));
  EXPECT_EQ(as_differential(*metadata).cascade.prefixes[0].num_keys, 512);
  cascade.forward(*metadata);
  expect_same(flat, cascade);

  // Another group whose requests share nothing.
  o.shared_keys = 0;
  DifferentialStep own(o), own_flat(o);
  const auto updated = cascade.build(640);
  const auto group = backend().make_builder(cascade.builder_config);
  const auto moved = group->update_block_table(*updated, own.block_table, own.batch.slot_mapping);
  EXPECT_THAT(as_differential(*moved).cascade.prefixes, IsEmpty());
  own.forward(*moved);
  own_flat.run();
  expect_same(own, own_flat);
}

TEST_P(DifferentialSameBits, CapturedCalls) {
  DifferentialStep first(options({1, 1, 1}, {5000, 700, 3}));
  BuilderConfig config = first.builder_config;
  config.capture = {.max_reqs = 8, .max_tokens = 64, .max_seq_len = 6000};
  config.cache.num_blocks = 4000;
  const auto builder = backend().make_builder(config);
  EXPECT_EQ(builder->graph_support(), GraphSupport::always);
  const auto metadata = builder->build_for_capture(first.batch);
  const std::size_t bytes = metadata->workspace_bytes();
  EXPECT_EQ(as_differential(*metadata).cascade.reason, CascadeReason::captured);
  for (const auto& o : {options({1}, {10}), options({1, 5, 40}, {1000, 33, 0}),
                        options({1, 1, 1, 1, 1, 1, 1}, {5999, 1, 2, 3, 4, 5, 6})}) {
    DifferentialStep captured(o), built(o);
    built.run();
    builder->refresh(*metadata, captured.batch);  // fills the buffers, which then stay
    const std::size_t before = testing::num_allocations();
    builder->refresh(*metadata, captured.batch);
    EXPECT_EQ(testing::num_allocations(), before);
    EXPECT_EQ(metadata->workspace_bytes(), bytes);
    captured.forward(*metadata);
    expect_same(captured, built);
  }
}

TEST_P(DifferentialSameBits, LayersBehindTheCutSeeTheWantedRowsOnly) {
  DifferentialStep step(options({300, 1, 40, 7}, {0, 90, 33, 600}));
  step.run();
  for (int r = 0; r < step.num_reqs(); ++r)
    step.batch.logits_indices.push_back(
        step.batch.query_start_loc[static_cast<std::size_t>(r) + 1] - 1);
  const CommonMetadata last = make_kv_sharing_fast_prefill_metadata(step.batch);
  ASSERT_EQ(last.num_tokens, 4);
  const auto metadata = backend().make_builder(step.builder_config)->build(0, last);
  const auto rows = [&](const TensorView& from) {
    std::vector<std::int64_t> shape(from.shape.begin(), from.shape.begin() + from.rank);
    shape[0] = last.num_tokens;
    HostTensor to(from.dtype, shape);
    for (std::size_t t = 0; t < 4; ++t)
      std::memcpy(to.view().select(0, static_cast<std::int64_t>(t)).data,
                  from.select(0, step.batch.logits_indices[t]).data, to.bytes() / 4);
    return to;
  };
  const HostTensor query = rows(step.query), lambdas = rows(step.token_lambda);
  HostTensor output = rows(step.output), lse = rows(step.lse);
  const auto want = output.snapshot(), want_lse = lse.snapshot();
  output.fill_bytes(0xFF);
  lse.fill_bytes(0xFF);
  step.impl_config.shares_kv_cache = true;
  step.workspace.reserve(metadata->workspace_bytes());
  ForwardArgs args = step.forward_args();
  args.query = query;
  args.key = args.value = {};
  if (!step.is_v1()) args.token_lambda = lambdas;
  args.output = output;
  args.lse = lse;
  backend().make_impl(step.impl_config)->forward(args, metadata.get());
  EXPECT_EQ(output.snapshot(), want);
  EXPECT_EQ(lse.snapshot(), want_lse);
}

INSTANTIATE_TEST_SUITE_P(Features, DifferentialSameBits,
                         ::testing::Values(Feature{"f32", [](DifferentialOptions&) {}},
                                           Feature{"bf16_halves",
                                                   [](DifferentialOptions& o) {
                                                     o.dtype = DType::bf16;
                                                     o.pairing = HeadPairing::halves;
                                                     o.layout = KvLayout::hnd;
                                                   }},
                                           Feature{"v2",
                                                   [](DifferentialOptions& o) {
                                                     o.variant = DifferentialVariant::v2;
                                                     o.num_kv_heads = 2;
                                                   }},
                                           Feature{"window_alibi",
                                                   [](DifferentialOptions& o) {
                                                     o.sliding_window = 550;
                                                     o.alibi_slopes = std::vector<float>(8, 0.05F);
                                                   }}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(DifferentialPrefixHit, ReadsWhatAnotherRequestWrote) {
  // Both requests begin with the same keys, in the same blocks.
  DifferentialOptions o;
  o.query_lens = {400, 370};
  o.context_lens = {0, 0};
  o.shared_keys = 320;
  o.dtype = DType::bf16;
  DifferentialStep whole(o), hit(o);
  whole.run_parts({{0, 0, 400}});
  whole.run_parts({{1, 0, 370}});
  whole.expect_oracle();
  hit.run_parts({{0, 0, 400}});
  hit.run_parts({{1, 320, 370}});
  hit.expect_cache();
  const auto rows = [](const HostTensor& t) {  // those that both steps have computed
    const auto all = t.snapshot();
    const auto row = static_cast<std::ptrdiff_t>(all.size() / (770 + 3));
    return std::vector(all.begin() + row * 720, all.begin() + row * 770);
  };
  EXPECT_EQ(rows(hit.output), rows(whole.output));
  EXPECT_EQ(rows(hit.lse), rows(whole.lse));
}

}  // namespace
}  // namespace attend
