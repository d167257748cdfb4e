// SPDX-License-Identifier: Apache-2.0
#include "serving/step.h"

#include <gmock/gmock.h>

#include <cmath>

#include "attend/core/float_types.h"

namespace attend::serving {
namespace {

using ::testing::ElementsAre;

/// A decode at position 20 and the first three tokens of a prompt, blocks of 16.
struct TwoRequests {
  Request decode, prefill;
  std::vector<std::int32_t> decode_blocks = {5, 2}, prefill_blocks = {7};
  RequestBatch batch;

  TwoRequests() {
    decode.id = 1;
    decode.prompt_tokens = 20;
    prefill.id = 2;
    prefill.prompt_tokens = 9;
    prefill.segments = {{77, 2}};
    batch.requests = {{&decode, 20, 1, decode_blocks}, {&prefill, 0, 3, prefill_blocks}};
    batch.num_tokens = 4;
  }
};

TEST(StepMetadata, DescribesTheBatch) {
  const TwoRequests two;
  const StepMetadata step = make_step_metadata(two.batch, 16);
  const CommonMetadata& m = step.common;
  EXPECT_NO_THROW(m.validate(16));
  EXPECT_THAT(m.query_start_loc, ElementsAre(0, 1, 4));
  EXPECT_THAT(m.seq_lens, ElementsAre(21, 3));
  EXPECT_THAT(m.slot_mapping, ElementsAre(2 * 16 + 4, 7 * 16, 7 * 16 + 1, 7 * 16 + 2));
  EXPECT_THAT(m.positions, ElementsAre(20, 0, 1, 2));
  EXPECT_THAT(m.is_prefilling, ElementsAre(0, 1));
  EXPECT_THAT(m.logits_indices, ElementsAre(0, 3));
  EXPECT_THAT(step.block_table, ElementsAre(5, 2, 7, -1));
  EXPECT_TRUE(m.causal);
  EXPECT_EQ(m.max_query_len, 3);
  EXPECT_EQ(m.max_seq_len, 21);
}

TEST(StepMetadata, SharingLayersComputeTokensWithLogitsOnly) {
  const TwoRequests two;
  const StepMetadata step = make_step_metadata(two.batch, 16);
  const StepMetadata sharing = make_sharing_metadata(step);
  const CommonMetadata& m = sharing.common;
  EXPECT_NO_THROW(m.validate(16));
  EXPECT_THAT(m.query_start_loc, ElementsAre(0, 1, 2));
  EXPECT_THAT(m.seq_lens, ElementsAre(21, 3));
  EXPECT_EQ(m.block_table.data, step.block_table.data());
  EXPECT_EQ(sharing.common_prefix_len, step.common_prefix_len);
  const auto tokens = make_sharing_tokens(step.common, make_step_tokens(two.batch));
  ASSERT_EQ(tokens.size(), 2U);
  EXPECT_EQ(tokens[0].request, &two.decode);
  EXPECT_EQ(tokens[0].position, 20);
  EXPECT_EQ(tokens[1].request, &two.prefill);
  EXPECT_EQ(tokens[1].position, 2);
  EXPECT_EQ(tokens[1].num_keys, 3);
}

TEST(StepMetadata, SharingLayersComputeAllOfADecodesDrafts) {
  TwoRequests two;
  two.batch.requests[0].num_scheduled_tokens = 3;
  two.batch.requests[0].num_draft_tokens = 2;
  two.batch.num_tokens = 6;
  const StepMetadata step = make_step_metadata(two.batch, 16);
  EXPECT_THAT(make_sharing_metadata(step).common.query_start_loc, ElementsAre(0, 3, 4));
  const auto tokens = make_sharing_tokens(step.common, make_step_tokens(two.batch));
  ASSERT_EQ(tokens.size(), 4U);
  for (std::size_t t = 0; t < 3; ++t)
    EXPECT_EQ(tokens[t].position, 20 + static_cast<std::int64_t>(t));
}

TEST(StepMetadata, TheCommonPrefixIsWholeComputedBlocksOfAllRequests) {
  TwoRequests two;
  std::vector<std::int32_t> other = {5, 2, 9};
  const auto common = [&](int computed, int other_computed) {
    two.batch.requests = {{&two.decode, computed, 1, two.decode_blocks},
                          {&two.prefill, other_computed, 1, other}};
    two.batch.num_tokens = 2;
    return make_step_metadata(two.batch, 16).common_prefix_len;
  };
  EXPECT_EQ(common(31, 40), 16) << "the last token of the second block is not computed";
  EXPECT_EQ(common(31, 15), 0);
  other[0] = 8;
  EXPECT_EQ(common(31, 40), 0);
  two.batch.requests.pop_back();
  two.batch.num_tokens = 1;
  EXPECT_EQ(make_step_metadata(two.batch, 16).common_prefix_len, 0) << "nobody to share with";
}

TEST(StepMetadata, EncodersHaveNeitherBlocksNorSlots) {
  TwoRequests two;
  two.batch.requests = {{&two.prefill, 0, 9, {}}};
  two.batch.num_tokens = 9;
  const StepMetadata step = make_step_metadata(two.batch, 0);
  EXPECT_FALSE(step.common.causal);
  EXPECT_FALSE(step.common.block_table.defined());
  EXPECT_TRUE(step.common.slot_mapping.empty());
  EXPECT_NO_THROW(step.common.validate(0));
}

TEST(StepTensors, HoldTheGeneratedValuesAndPoisonedOutputs) {
  const TwoRequests two;
  ModelPreset model;
  model.num_q_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 8;
  const ValueGenerator generator(3, DType::f32);
  StepTensors tensors(model, DType::f32);
  const auto executor = make_thread_pool(2);
  const auto tokens = make_step_tokens(two.batch);
  tensors.fill(tokens, tokens, 6, generator, *executor);

  const auto expect_row = [&](const ConstTensorView& t, int token, int head, const RowKey& key) {
    std::vector<float> want(8);
    generator.fill_f32(key, 8, want.data());
    const auto* got = t.select(0, token).select(0, head).as<float>();
    EXPECT_TRUE(std::equal(want.begin(), want.end(), got)) << "token " << token << " head " << head;
  };
  const std::uint64_t own = own_content_id(two.prefill), shared = content_id(two.prefill, 1);
  ASSERT_NE(own, shared);
  expect_row(tensors.query(), 2, 3, {own, 1, 6, 3, ValueKind::query});
  expect_row(tensors.key(), 2, 1, {shared, 1, 6, 1, ValueKind::key});
  expect_row(tensors.value(), 2, 0, {shared, 1, 6, 0, ValueKind::value});
  expect_row(tensors.key(), 3, 1, {own, 2, 6, 1, ValueKind::key});
  expect_row(tensors.key(), 0, 0, {own_content_id(two.decode), 20, 6, 0, ValueKind::key});
  for (const float v : tensors.output_row(3, 3)) EXPECT_TRUE(std::isnan(v));
  EXPECT_TRUE(std::isnan(tensors.lse_value(3, 3)));
}

TEST(StepTensors, HoldLatentsAndRotatedKeysOfMla) {
  const TwoRequests two;
  ModelPreset model;
  model.num_q_heads = 3;
  model.num_kv_heads = 1;
  model.mla = MlaDims{16, 8, 4, 12};
  model.head_dim = 20;
  const ValueGenerator generator(3, DType::f32);
  StepTensors tensors(model, DType::f32);
  const auto executor = make_thread_pool(2);
  const auto tokens = make_step_tokens(two.batch);
  tensors.fill(tokens, tokens, 6, generator, *executor);

  EXPECT_FALSE(tensors.key().defined());
  EXPECT_FALSE(tensors.value().defined());
  const auto expect_row = [&](const ConstTensorView& row, std::int64_t count, const RowKey& key) {
    ASSERT_EQ(row.numel(), count);
    std::vector<float> want(static_cast<std::size_t>(count));
    generator.fill_f32(key, static_cast<int>(count), want.data());
    EXPECT_TRUE(std::equal(want.begin(), want.end(), row.as<float>()));
  };
  const std::uint64_t own = own_content_id(two.prefill), shared = content_id(two.prefill, 1);
  expect_row(tensors.query().select(0, 2).select(0, 2), 12, {own, 1, 6, 2, ValueKind::query});
  expect_row(tensors.kv_c().select(0, 2), 16, {shared, 1, 6, 0, ValueKind::key});
  expect_row(tensors.k_pe().select(0, 2), 4, {shared, 1, 6, 0, ValueKind::value});
  EXPECT_EQ(tensors.output().shape[2], 12);
  EXPECT_THAT(tensors.output_row(3, 2), ::testing::SizeIs(12));
  for (const float v : tensors.output_row(3, 2)) EXPECT_TRUE(std::isnan(v));
}

TEST(StepTokens, OfMlaKnowTheirPath) {
  TwoRequests two;
  const auto paths = [&](int decode_threshold) {
    const StepMetadata step = make_step_metadata(two.batch, 16);
    auto tokens = make_step_tokens(two.batch);
    mark_mla_decodes(step.common, decode_threshold, tokens);
    std::vector<bool> decode;
    for (const StepToken& t : tokens) decode.push_back(t.mla_decode);
    return decode;
  };
  EXPECT_THAT(paths(1), ElementsAre(true, false, false, false));
  EXPECT_THAT(paths(2), ElementsAre(true, false, false, false));
  EXPECT_THAT(paths(3), ElementsAre(true, false, false, false));  // the second one is fresh
  two.batch.requests[1].num_computed_tokens = 4;
  EXPECT_THAT(paths(2), ElementsAre(true, false, false, false));
  EXPECT_THAT(paths(3), ElementsAre(true, true, true, true));
}

TEST(StepWork, OfMlaCountsTheProjectionOfEveryKey) {
  TwoRequests two;
  two.batch.requests[1].num_computed_tokens = 4;  // positions 4, 5, 6
  ModelPreset model;
  model.num_q_heads = 3;
  model.num_kv_heads = 1;
  model.mla = MlaDims{16, 8, 4, 12};
  model.head_dim = 20;
  const StepWork work = measure_work(two.batch, model, 40, {});
  EXPECT_EQ(work.prefill_flops, (5 + 6 + 7) * 3 * 2 * (12 + 12) + 7 * 3 * 2 * 16 * (8 + 12));
  EXPECT_EQ(work.decode_bytes, 21 * 40);
}

TEST(StepWork, CountsVisiblePairsAndBytes) {
  TwoRequests two;
  two.batch.requests[1].num_computed_tokens = 4;  // positions 4, 5, 6
  ModelPreset model;
  model.num_q_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 8;
  const StepWork all = measure_work(two.batch, model, 100, {});
  EXPECT_EQ(all.prefill_flops, (5 + 6 + 7) * 4 * 4 * 8);
  EXPECT_EQ(all.decode_bytes, 21 * 100);
  const StepWork windowed = measure_work(two.batch, model, 100, {.window = 6});
  EXPECT_EQ(windowed.prefill_flops, (5 + 6 + 6) * 4 * 4 * 8);
  EXPECT_EQ(windowed.decode_bytes, 6 * 100);
  const StepWork tiny = measure_work(two.batch, model, 100, {.window = 1});
  EXPECT_EQ(tiny.prefill_flops, 3 * 4 * 4 * 8);
}

TEST(StepWork, OfDifferentialAttentionHasValuesAsWideAsTwoHeads) {
  ModelPreset model;
  model.num_q_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 8;
  model.differential.emplace();
  const TwoRequests two;
  const StepWork all = measure_work(two.batch, model, 100, {AttentionType::decoder});
  EXPECT_EQ(all.prefill_flops, (1 + 2 + 3) * 4 * 2 * (8 + 16));
  EXPECT_EQ(all.decode_bytes, 21 * 100);
  const LayerKind sharing{.type = AttentionType::decoder, .shares_cache = true};
  const StepWork last = measure_work(two.batch, model, 100, sharing);
  EXPECT_EQ(last.prefill_flops, 3 * 4 * 2 * (8 + 16));
  EXPECT_EQ(last.decode_bytes, 21 * 100);
}

TEST(StepTensors, HoldAPairsResultInTwoHeads) {
  ModelPreset model;
  model.num_q_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 8;
  model.differential.emplace();
  const TwoRequests two;
  const auto tokens = make_step_tokens(two.batch);
  StepTensors tensors(model, DType::f32);
  tensors.fill(tokens, {}, 0, ValueGenerator(1, DType::f32), default_executor());
  const TensorView out = tensors.output();
  EXPECT_EQ(out.shape[1], 4);
  for (std::int64_t i = 0; i < out.numel(); ++i) out.as<float>()[i] = static_cast<float>(i);
  const std::vector<float> row = tensors.output_row(1, 1);
  ASSERT_EQ(row.size(), 16U);
  for (std::size_t d = 0; d < 16; ++d) EXPECT_EQ(row[d], static_cast<float>(1 * 32 + 16 + d));
}

TEST(StepMetadata, CrossAttentionReadsTheEncodersBlocks) {
  TwoRequests two;
  const std::vector<std::int32_t> first = {9, 1}, second = {0, 4};
  two.batch.requests[0].encoder_blocks = first;
  two.batch.requests[1].encoder_blocks = second;
  two.batch.requests[1].new_encoder = true;
  const StepMetadata decoder = make_step_metadata(two.batch, 16);
  const StepMetadata cross = make_cross_metadata(decoder, two.batch, 18, 16);
  const CommonMetadata& m = cross.common;
  EXPECT_EQ(m.query_start_loc, decoder.common.query_start_loc);
  EXPECT_EQ(m.num_tokens, 4);
  EXPECT_FALSE(m.causal);
  EXPECT_THAT(m.encoder_seq_lens, ElementsAre(18, 18));
  EXPECT_THAT(cross.block_table, ElementsAre(9, 1, 0, 4));
  EXPECT_EQ(m.block_table.data, cross.block_table.data());
  ASSERT_EQ(m.encoder_slot_mapping.size(), 18U);  // of the new request only
  EXPECT_EQ(m.encoder_slot_mapping[0], 0);
  EXPECT_EQ(m.encoder_slot_mapping[15], 15);
  EXPECT_EQ(m.encoder_slot_mapping[16], 4 * 16);
  EXPECT_TRUE(m.slot_mapping.empty());
}

TEST(StepMetadata, AnEncoderBatchHasAllTokensOfTheNewRequests) {
  TwoRequests two;
  two.batch.requests[1].new_encoder = true;
  const RequestBatch encoder = make_encoder_batch(two.batch, 18);
  EXPECT_EQ(encoder.num_tokens, 18);
  const StepMetadata step = make_step_metadata(encoder, 0);
  EXPECT_THAT(step.common.seq_lens, ElementsAre(18));
  const auto tokens = make_encoder_tokens(encoder);
  ASSERT_EQ(tokens.size(), 18U);
  EXPECT_EQ(tokens[17].position, 17);
  EXPECT_EQ(tokens[17].num_keys, 18);
  EXPECT_EQ(tokens[17].content, encoder_content_id(two.prefill));
  EXPECT_EQ(tokens[17].own_content, encoder_content_id(two.prefill));
  two.batch.requests[1].new_encoder = false;
  EXPECT_TRUE(make_encoder_tokens(make_encoder_batch(two.batch, 18)).empty());
}

TEST(StepWork, CrossAttentionSeesAllEncoderTokens) {
  const TwoRequests two;
  ModelPreset model;
  model.num_q_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 8;
  model.encoder_tokens = 30;
  const StepWork work = measure_work(two.batch, model, 100, {AttentionType::encoder_decoder});
  EXPECT_EQ(work.prefill_flops, 3 * 30 * 4 * 4 * 8);
  EXPECT_EQ(work.decode_bytes, 30 * 100);
}

TEST(StepWork, EncodersSeeTheWholePrompt) {
  TwoRequests two;
  two.batch.requests = {{&two.prefill, 0, 9, {}}};
  ModelPreset model;
  model.num_q_heads = model.num_kv_heads = 2;
  model.head_dim = 8;
  model.attn_type = AttentionType::encoder_only;
  EXPECT_EQ(measure_work(two.batch, model, 100, {AttentionType::encoder_only}).prefill_flops,
            81 * 2 * 4 * 8);
}

}  // namespace
}  // namespace attend::serving
