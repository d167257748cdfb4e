// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <functional>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "backend/flash_attn_step.h"
#include "backends/flash_attn/metadata.h"

namespace attend {
namespace {

using flash_attn::FlashAttnMetadata;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using testing::Step;
using testing::StepOptions;

const FlashAttnMetadata& as_flash_attn(const std::unique_ptr<Metadata>& m) {
  return dynamic_cast<const FlashAttnMetadata&>(*m);
}

struct OtherMetadata final : Metadata {
  std::size_t workspace_bytes() const noexcept override { return 0; }
};

TEST(FlashAttnMetadata, OnePlanCoversTheMixedBatchWithoutPadding) {
  Step step({});
  const auto metadata = step.build();
  const FlashAttnMetadata& m = as_flash_attn(metadata);
  EXPECT_THAT(m.plan->query_start_loc, ElementsAre(0, 1, 6, 46));
  EXPECT_THAT(m.plan->seq_lens, ElementsAre(71, 38, 40));
  EXPECT_EQ(m.num_reqs, 3);
  EXPECT_EQ(m.num_tokens, 46);
  EXPECT_EQ(m.slot_mapping.size(), 46U);
  EXPECT_EQ(m.slot_mapping.front(), step.slot(0, 70));
  EXPECT_EQ(m.slot_mapping.back(), step.slot(2, 39));
  EXPECT_EQ(m.block_table.shape[0], 3);
  EXPECT_EQ(m.workspace_bytes(), m.plan->workspace_bytes);
  EXPECT_EQ(m.split, (DecodePrefillSplit{1, 2, 1, 45}));
}

TEST(FlashAttnMetadata, SplitUsesTheSpeculativeThreshold) {
  Step step({});
  step.builder_config.num_speculative_tokens = 4;
  EXPECT_EQ(as_flash_attn(step.build()).split, (DecodePrefillSplit{2, 1, 6, 40}));
}

TEST(FlashAttnMetadata, EncodersHaveNoCacheAndAreNeverCausal) {
  StepOptions o;
  o.context_lens = {0, 0, 0};
  o.attn_type = AttentionType::encoder_only;
  Step step(o);
  const auto metadata = step.build();
  const FlashAttnMetadata& m = as_flash_attn(metadata);
  EXPECT_FALSE(m.block_table.defined());
  EXPECT_THAT(m.slot_mapping, IsEmpty());
  EXPECT_FALSE(m.causal);
  EXPECT_THAT(m.plan->request_causal, ElementsAre(0, 0, 0));
}

TEST(FlashAttnBuild, RefusesBadBatches) {
  struct Bad {
    const char* argument;
    std::function<void(Step&)> change;
  };
  const std::vector<Bad> cases = {
      {"query_start_loc", [](Step& s) { s.batch.query_start_loc[0] = 1; }},
      {"query_start_loc", [](Step& s) { s.batch.num_tokens = 45; }},
      {"seq_lens", [](Step& s) { s.batch.seq_lens[2] = 39; }},
      {"block_table", [](Step& s) { s.batch.block_table = {}; }},
      {"block_table", [](Step& s) { s.batch.block_table.shape[1] = 4; }},
      {"block_table", [](Step& s) { s.batch.block_table.shape[0] = 2; }},
      {"block_table", [](Step& s) { s.batch.block_table.dtype = DType::i64; }},
      {"block_table", [](Step& s) { s.batch.block_table.strides[1] = 2; }},
      {"slot_mapping", [](Step& s) { s.batch.slot_mapping.resize(45); }},
      {"slot_mapping",
       [](Step& s) { s.batch.slot_mapping[45] = s.builder_config.cache.num_blocks * 16; }},
      {"slot_mapping", [](Step& s) { s.batch.slot_mapping[0] = -2; }},
  };
  for (const Bad& bad : cases) {
    Step step({});
    bad.change(step);
    try {
      step.build();
      ADD_FAILURE() << "no exception for a bad " << bad.argument;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), bad.argument) << e.what();
    }
  }
}

TEST(FlashAttnBuild, CommonPrefixMayBeAsLongAsTheShortestContext) {
  StepOptions o;
  o.context_lens = {70, 33, 40};
  Step step(o);
  EXPECT_NO_THROW(step.build(32));
  EXPECT_THROW(step.build(48), InvalidArgument);
  EXPECT_THROW(step.build(-16), InvalidArgument);
  EXPECT_THROW(step.build(24), InvalidArgument) << "no whole number of blocks";
}

TEST(FlashAttnBuild, EncodersRefuseContext) {
  StepOptions o;
  o.attn_type = AttentionType::encoder;
  o.context_lens = {0, 1, 0};
  Step step(o);
  try {
    step.build();
    FAIL() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "seq_lens");
  }
}

TEST(FlashAttnBuild, EmptyBatch) {
  Step step({});
  step.batch = {};
  step.batch.query_start_loc = {0};
  const auto metadata = step.build();
  EXPECT_EQ(as_flash_attn(metadata).num_tokens, 0);
  const auto before = step.output.snapshot();
  find_backend("FLASH_ATTN")
      .make_impl(step.impl_config)
      ->forward(step.forward_args(), metadata.get());
  EXPECT_EQ(step.output.snapshot(), before);
}

TEST(UpdateBlockTable, ReplacesTableAndSlotsAndSharesThePlan) {
  Step step({});
  const auto builder = find_backend("FLASH_ATTN").make_builder(step.builder_config);
  const auto first = builder->build(0, step.batch);
  testing::HostTensor table(DType::i32, {5, 6});
  const std::vector<std::int64_t> slots(50, 3);
  const auto second = builder->update_block_table(*first, table, slots);
  const FlashAttnMetadata& m = as_flash_attn(second);
  EXPECT_EQ(m.block_table.data, table.view().data);
  EXPECT_EQ(m.block_table.shape[0], 3);
  EXPECT_THAT(m.slot_mapping, ::testing::AllOf(::testing::SizeIs(46), ::testing::Each(3)));
  EXPECT_EQ(m.plan, as_flash_attn(first).plan);
  EXPECT_EQ(m.split, as_flash_attn(first).split);
  EXPECT_EQ(as_flash_attn(first).block_table.data, step.block_table.view().data);
  EXPECT_EQ(as_flash_attn(first).slot_mapping.front(), step.slot(0, 70));
}

TEST(UpdateBlockTable, RefusesWhatDoesNotFit) {
  Step step({});
  const auto builder = find_backend("FLASH_ATTN").make_builder(step.builder_config);
  const auto metadata = builder->build(0, step.batch);
  const std::vector<std::int64_t> slots(46, -1);
  const auto update = [&](const ConstTensorView& table, std::span<const std::int64_t> with) {
    return builder->update_block_table(*metadata, table, with);
  };
  const testing::HostTensor good(DType::i32, {3, 5}), narrow(DType::i32, {3, 4}),
      short_one(DType::i32, {2, 5}), wide_type(DType::i64, {3, 5});
  EXPECT_NO_THROW(update(good, slots));
  EXPECT_NO_THROW(update(good, {}));
  EXPECT_THROW(update(narrow, slots), InvalidArgument);
  EXPECT_THROW(update(short_one, slots), InvalidArgument);
  EXPECT_THROW(update(wide_type, slots), InvalidArgument);
  EXPECT_THROW(update({}, slots), InvalidArgument);
  EXPECT_THROW(update(good, std::span(slots).first(45)), InvalidArgument);
  const std::vector<std::int64_t> beyond(46, step.builder_config.cache.num_blocks * 16);
  EXPECT_THROW(update(good, beyond), InvalidArgument);
  EXPECT_THROW(builder->update_block_table(OtherMetadata(), good, slots), InvalidArgument);
}

TEST(UpdateBlockTable, RefusesEncoders) {
  StepOptions o;
  o.context_lens = {0, 0, 0};
  o.attn_type = AttentionType::encoder;
  Step step(o);
  const auto metadata = step.build();
  EXPECT_THROW(find_backend("FLASH_ATTN")
                   .make_builder(step.builder_config)
                   ->update_block_table(*metadata, step.block_table, {}),
               InvalidArgument);
}

}  // namespace
}  // namespace attend
