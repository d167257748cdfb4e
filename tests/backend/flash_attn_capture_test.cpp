// SPDX-License-Identifier: Apache-2.0
// Metadata for captured graphs: one call of forward(), run again with other batches.
#include <gmock/gmock.h>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "backend/allocation_counter.h"
#include "backend/flash_attn_step.h"
#include "backends/flash_attn/metadata.h"

namespace attend {
namespace {

using flash_attn::FlashAttnMetadata;
using testing::Step;
using testing::StepOptions;

constexpr AotLimits kLimits{.max_reqs = 8, .max_tokens = 64, .max_seq_len = 6000};

StepOptions decodes(std::vector<int> context_lens, std::uint64_t seed) {
  StepOptions o;
  o.query_lens = std::vector<int>(context_lens.size(), 1);
  o.context_lens = std::move(context_lens);
  o.seed = seed;
  return o;
}

std::unique_ptr<MetadataBuilder> capturing_builder(const Step& step) {
  BuilderConfig config = step.builder_config;
  config.capture = kLimits;
  config.cache.num_blocks = 4000;
  return find_backend("FLASH_ATTN").make_builder(config);
}

const FlashAttnMetadata& as_flash_attn(const Metadata& m) {
  return dynamic_cast<const FlashAttnMetadata&>(m);
}

void forward(Step& step, const Metadata& m) {
  find_backend("FLASH_ATTN").make_impl(step.impl_config)->forward(step.forward_args(), &m);
}

TEST(FlashAttnCapture, RunsOtherBatchesWithTheirBits) {
  Step first(decodes({5000, 700, 3}, 1));
  const auto builder = capturing_builder(first);
  EXPECT_EQ(builder->graph_support(), GraphSupport::always);
  const auto metadata = builder->build_for_capture(first.batch);
  const std::size_t workspace_bytes = metadata->workspace_bytes();
  EXPECT_EQ(as_flash_attn(*metadata).cascade.reason, CascadeReason::captured);
  first.workspace.reserve(workspace_bytes);
  forward(first, *metadata);
  first.expect_oracle();

  StepOptions mixed;
  mixed.query_lens = {1, 5, 40};
  mixed.context_lens = {1000, 33, 0};
  mixed.request_causal = {1, 0, 1};
  for (const StepOptions& o : {decodes({10}, 2), mixed, decodes({5999, 1, 2, 3, 4, 5, 6, 7}, 3)}) {
    Step captured(o), built(o);
    built.run();
    builder->refresh(*metadata, captured.batch);
    EXPECT_EQ(metadata->workspace_bytes(), workspace_bytes);
    captured.workspace.reserve(workspace_bytes);
    forward(captured, *metadata);
    EXPECT_EQ(captured.output.snapshot(), built.output.snapshot());
    EXPECT_EQ(captured.lse.snapshot(), built.lse.snapshot());
    captured.expect_cache();
  }
}

TEST(FlashAttnCapture, RefreshingDoesNotAllocate) {
  Step first(decodes({5000, 700, 3}, 1)), second(decodes({5999, 1, 2, 3, 4, 5, 6, 7}, 3));
  const auto builder = capturing_builder(first);
  const auto metadata = builder->build_for_capture(first.batch);
  const auto copy = builder->update_block_table(*metadata, first.block_table, {});
  const auto impl = find_backend("FLASH_ATTN").make_impl(second.impl_config);
  second.workspace.reserve(metadata->workspace_bytes());
  const ForwardArgs args = second.forward_args();
  builder->refresh(*metadata, second.batch);
  impl->forward(args, metadata.get());  // threads start here
  builder->refresh(*metadata, first.batch);
  const std::size_t before = testing::num_allocations();
  builder->refresh(*metadata, second.batch);
  builder->refresh(*copy, second.batch);
  impl->forward(args, metadata.get());
  EXPECT_EQ(testing::num_allocations(), before);
}

TEST(FlashAttnCapture, TheWorkspaceOfInt8LayersHasOneSizeToo) {
  Step few(decodes({700, 3}, 1)), many(decodes({5999, 1, 2, 3, 4, 5, 6, 7}, 3));
  BuilderConfig config = few.builder_config;
  config.capture = kLimits;
  config.cache.num_blocks = 4000;
  config.cache.dtype = DType::i8;
  config.cache.format = KvFormat::int8_level1;
  const auto builder = find_backend("FLASH_ATTN").make_builder(config);
  const auto metadata = builder->build_for_capture(few.batch);
  const std::size_t bytes = metadata->workspace_bytes();
  EXPECT_GE(bytes, builder->build(0, many.batch)->workspace_bytes());
  builder->refresh(*metadata, many.batch);
  EXPECT_EQ(metadata->workspace_bytes(), bytes);
}

TEST(FlashAttnCapture, CopiesForOtherCacheGroupsFollow) {
  const StepOptions o = decodes({900, 20, 3}, 4);
  Step first(decodes({5000, 700, 3}, 1)), group(o), built(o);
  const auto builder = capturing_builder(first);
  const auto metadata = builder->build_for_capture(first.batch);
  const auto copy = builder->update_block_table(*metadata, first.block_table, {});
  EXPECT_EQ(as_flash_attn(*copy).plan, as_flash_attn(*metadata).plan);
  builder->refresh(*copy, group.batch);
  group.workspace.reserve(copy->workspace_bytes());
  forward(group, *copy);
  built.run();
  EXPECT_EQ(group.output.snapshot(), built.output.snapshot());
  group.expect_cache();
}

TEST(FlashAttnCapture, WhatDoesNotFitIsRefusedAndLeavesTheMetadata) {
  Step first(decodes({5000, 700, 3}, 1));
  const auto builder = capturing_builder(first);
  const auto metadata = builder->build_for_capture(first.batch);
  const auto refuse = [&](const StepOptions& o, const char* argument) {
    const Step other(o);
    try {
      builder->refresh(*metadata, other.batch);
      ADD_FAILURE() << "accepted a bad " << argument;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "FLASH_ATTN.refresh") << e.what();
      EXPECT_EQ(e.argument(), argument) << e.what();
    }
    EXPECT_EQ(as_flash_attn(*metadata).plan->seq_lens, (std::vector<std::int32_t>{5001, 701, 4}));
    EXPECT_EQ(as_flash_attn(*metadata).num_tokens, 3);
  };
  refuse(decodes(std::vector<int>(9, 5), 2), "seq_lens");
  refuse(decodes({6000}, 2), "seq_lens");
  StepOptions longer;
  longer.query_lens = {65};
  longer.context_lens = {0};
  refuse(longer, "query_start_loc");

  const auto built = builder->build(0, first.batch);
  EXPECT_THROW(builder->refresh(*built, first.batch), InvalidArgument) << "not for capture";
}

TEST(FlashAttnCapture, NeedsRoomAndADecoder) {
  Step step({});
  const auto plain = find_backend("FLASH_ATTN").make_builder(step.builder_config);
  EXPECT_EQ(plain->graph_support(), GraphSupport::never);
  EXPECT_THROW(plain->build_for_capture(step.batch), Unsupported);
  StepOptions o;
  o.attn_type = AttentionType::encoder;
  o.context_lens = {0, 0, 0};
  Step encoder(o);
  const auto builder = capturing_builder(encoder);
  EXPECT_EQ(builder->graph_support(), GraphSupport::never);
  EXPECT_THROW(builder->build_for_capture(encoder.batch), Unsupported);
}

}  // namespace
}  // namespace attend
