// SPDX-License-Identifier: Apache-2.0
// FLASH_ATTN attends once to what requests share, with the bits of attending flat.
#include <gmock/gmock.h>

#include <functional>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "backend/flash_attn_step.h"
#include "backends/flash_attn/metadata.h"

namespace attend {
namespace {

using flash_attn::FlashAttnMetadata;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using testing::Step;
using testing::StepOptions;

/// Decodes and a prefill behind a prefix of 640 keys.
StepOptions sharing() {
  StepOptions o;
  o.query_lens = {1, 1, 3, 1, 20};
  o.context_lens = {700, 900, 640, 650, 1000};
  o.shared_keys = 640;
  return o;
}

const FlashAttnMetadata& as_flash_attn(const std::unique_ptr<Metadata>& m) {
  return dynamic_cast<const FlashAttnMetadata&>(*m);
}

void forward(Step& step, const Metadata& metadata) {
  step.workspace.reserve(metadata.workspace_bytes());
  find_backend("FLASH_ATTN").make_impl(step.impl_config)->forward(step.forward_args(), &metadata);
}

struct Feature {
  const char* name;
  std::function<void(StepOptions&)> set;
};

class FlashAttnCascade : public ::testing::TestWithParam<Feature> {};

TEST_P(FlashAttnCascade, HasTheBitsOfFlatAttention) {
  StepOptions o = sharing();
  GetParam().set(o);
  Step flat(o), cascade(o);
  flat.builder_config.cascade = CascadeMode::off;
  flat.run();
  flat.expect_oracle();
  cascade.builder_config.cascade = CascadeMode::always;
  const auto metadata = cascade.build();
  const FlashAttnMetadata& m = as_flash_attn(metadata);
  ASSERT_THAT(m.cascade.prefixes, SizeIs(1));
  EXPECT_EQ(m.cascade.prefixes[0].request_end, 5);
  EXPECT_EQ(m.cascade.prefixes[0].num_keys, 512);
  EXPECT_FALSE(m.plan->reductions.empty());
  forward(cascade, *metadata);
  EXPECT_EQ(cascade.output.snapshot(), flat.output.snapshot());
  EXPECT_EQ(cascade.lse.snapshot(), flat.lse.snapshot());
  cascade.expect_cache();
}

INSTANTIATE_TEST_SUITE_P(
    Features, FlashAttnCascade,
    ::testing::Values(Feature{"plain", [](StepOptions&) {}},
                      Feature{"bf16", [](StepOptions& o) { o.dtype = DType::bf16; }},
                      Feature{"window", [](StepOptions& o) { o.sliding_window = 600; }},
                      Feature{"softcap_alibi",
                              [](StepOptions& o) {
                                o.softcap = 5.0F;
                                o.alibi_slopes = {0.5F, 0.25F, 0.1F, 0.01F};
                              }},
                      Feature{"not_causal", [](StepOptions& o) { o.causal = false; }},
                      Feature{"hnd_layered",
                              [](StepOptions& o) {
                                o.layout = KvLayout::hnd;
                                o.num_layers = 2;
                              }}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(FlashAttnCascadeDecision, SaysWhyItStaysFlat) {
  Step step(sharing());
  step.builder_config.cascade = CascadeMode::off;
  EXPECT_EQ(as_flash_attn(step.build()).cascade.reason, CascadeReason::off);
  step.builder_config.cascade = CascadeMode::vllm;
  EXPECT_EQ(as_flash_attn(step.build()).cascade.reason, CascadeReason::short_prefix);
  EXPECT_EQ(as_flash_attn(step.build(640)).cascade.reason, CascadeReason::few_requests);
  StepOptions encoder;
  encoder.context_lens = {0, 0, 0};
  encoder.attn_type = AttentionType::encoder;
  EXPECT_EQ(as_flash_attn(Step(encoder).build()).cascade.reason, CascadeReason::no_block_table);
  StepOptions cross;
  cross.attn_type = AttentionType::encoder_decoder;
  cross.encoder_lens = {300, 300, 300};
  cross.new_encoder = {0, 0, 0};
  EXPECT_EQ(as_flash_attn(Step(cross).build()).cascade.reason, CascadeReason::encoder_keys);
}

TEST(FlashAttnCascadeDecision, TheRuleOfVllmTakesTheCommonPrefix) {
  StepOptions o = sharing();
  o.query_lens = std::vector<int>(8, 1);
  o.context_lens = std::vector<int>(8, 660);
  o.num_q_heads = 2;  // not grouped: always shared
  Step flat(o), cascade(o);
  flat.builder_config.cascade = CascadeMode::off;
  flat.run();
  cascade.builder_config.cascade = CascadeMode::vllm;
  const auto metadata = cascade.build(640);
  ASSERT_THAT(as_flash_attn(metadata).cascade.prefixes, SizeIs(1));
  EXPECT_EQ(as_flash_attn(metadata).cascade.prefixes[0].num_keys, 640);
  forward(cascade, *metadata);
  EXPECT_EQ(cascade.output.snapshot(), flat.output.snapshot());

  cascade.builder_config.use_alibi = true;
  EXPECT_EQ(as_flash_attn(cascade.build(640)).cascade.reason, CascadeReason::alibi);
}

TEST(FlashAttnCascadeDecision, AWrongCommonPrefixIsRefusedBeforeAnythingIsWritten) {
  StepOptions o = sharing();
  o.query_lens = std::vector<int>(8, 1);
  o.context_lens = std::vector<int>(8, 660);
  o.num_q_heads = 2;
  o.shared_keys = 624;
  Step step(o);
  step.builder_config.cascade = CascadeMode::vllm;
  const auto metadata = step.build(640);
  const auto before = step.cache_memory.snapshot();
  EXPECT_THROW(forward(step, *metadata), InvalidArgument);
  EXPECT_EQ(step.cache_memory.snapshot(), before);
}

TEST(FlashAttnCascadeDecision, AnotherBlockTableWithoutSharingIsAttendedFlat) {
  StepOptions o = sharing();
  Step shared(o);
  shared.builder_config.cascade = CascadeMode::always;
  const auto builder = find_backend("FLASH_ATTN").make_builder(shared.builder_config);
  const auto first = builder->build(0, shared.batch);

  const auto same = builder->update_block_table(*first, shared.block_table, {});
  EXPECT_EQ(as_flash_attn(same).plan, as_flash_attn(first).plan);

  o.shared_keys = 0;
  Step own(o);
  const auto second = builder->update_block_table(*first, own.block_table, own.batch.slot_mapping);
  EXPECT_THAT(as_flash_attn(second).cascade.prefixes, IsEmpty());
  EXPECT_NE(as_flash_attn(second).plan, as_flash_attn(first).plan);
  forward(own, *second);
  own.expect_oracle();
  own.expect_cache();
}

}  // namespace
}  // namespace attend
