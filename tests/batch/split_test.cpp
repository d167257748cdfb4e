// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/split.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "attend/core/error.h"

namespace attend {
namespace {

CommonMetadata batch(const std::vector<int>& query_lens) {
  CommonMetadata m;
  m.num_reqs = static_cast<int>(query_lens.size());
  m.query_start_loc = {0};
  for (const int len : query_lens) {
    m.num_tokens += len;
    m.query_start_loc.push_back(m.num_tokens);
    m.seq_lens.push_back(len + 10);
    m.max_query_len = std::max(m.max_query_len, len);
  }
  m.max_seq_len = m.max_query_len + 10;
  return m;
}

using Split = DecodePrefillSplit;

TEST(SplitTest, AllDecodes) {
  EXPECT_EQ(split_decodes_and_prefills(batch({1, 1, 1})), (Split{3, 0, 3, 0}));
  EXPECT_EQ(split_decodes_and_prefills(batch({})), (Split{0, 0, 0, 0}));
}

TEST(SplitTest, AllPrefills) {
  EXPECT_EQ(split_decodes_and_prefills(batch({5, 1, 1})), (Split{0, 3, 0, 7}));
}

TEST(SplitTest, Mixed) {
  EXPECT_EQ(split_decodes_and_prefills(batch({1, 1, 4, 7})), (Split{2, 2, 2, 11}));
}

TEST(SplitTest, EverythingBehindTheFirstPrefillIsPrefill) {
  EXPECT_EQ(split_decodes_and_prefills(batch({1, 4, 1, 1})), (Split{1, 3, 1, 6}));
}

TEST(SplitTest, TheThresholdIsInclusive) {
  EXPECT_EQ(split_decodes_and_prefills(batch({3, 4, 5}), {.decode_threshold = 4}),
            (Split{2, 1, 7, 5}));
}

TEST(SplitTest, ALooseUpperBoundChangesNothing) {
  CommonMetadata m = batch({1, 1, 1});
  m.max_query_len = 100;
  EXPECT_EQ(split_decodes_and_prefills(m), (Split{3, 0, 3, 0}));
}

TEST(SplitTest, ZeroLengthRowsCountAsDecodes) {
  EXPECT_EQ(split_decodes_and_prefills(batch({1, 0, 4})), (Split{2, 1, 1, 4}));
}

TEST(SplitUniformTest, DecodesHaveTheFirstLength) {
  const SplitOptions o{.decode_threshold = 4, .require_uniform = true};
  EXPECT_EQ(split_decodes_and_prefills(batch({3, 3, 3}), o), (Split{3, 0, 9, 0}));
  EXPECT_EQ(split_decodes_and_prefills(batch({3, 3, 2}), o), (Split{2, 1, 6, 2}));
  EXPECT_EQ(split_decodes_and_prefills(batch({2, 3, 3}), o), (Split{1, 2, 2, 6}));
  EXPECT_EQ(split_decodes_and_prefills(batch({5, 5}), o), (Split{0, 2, 0, 10}));
}

TEST(SplitUniformTest, ZeroRowsPadOnlyIfAllOthersAreUniform) {
  const SplitOptions o{.decode_threshold = 4, .require_uniform = true};
  EXPECT_EQ(split_decodes_and_prefills(batch({3, 3, 0, 0}), o), (Split{4, 0, 6, 0}));
  EXPECT_EQ(split_decodes_and_prefills(batch({3, 0, 2}), o), (Split{1, 2, 3, 2}));
}

TEST(SplitUniformTest, AThresholdOfOneIsUniformByItself) {
  const SplitOptions o{.decode_threshold = 1, .require_uniform = true};
  EXPECT_EQ(split_decodes_and_prefills(batch({1, 1, 0}), o), (Split{3, 0, 2, 0}));
}

TEST(SplitPrefillingTest, ShortExtendsBecomePrefills) {
  CommonMetadata m = batch({1, 1, 1, 5});
  m.is_prefilling = {0, 0, 1, 1};
  const SplitOptions o{.treat_short_extends_as_decodes = false};
  EXPECT_EQ(split_decodes_and_prefills(m, o), (Split{2, 2, 2, 6}));
  EXPECT_EQ(split_decodes_and_prefills(m), (Split{3, 1, 3, 5}));
  m.is_prefilling = {0, 0, 0, 0};
  EXPECT_EQ(split_decodes_and_prefills(m, o), (Split{3, 1, 3, 5}));
}

TEST(SplitPrefillingTest, CountsEvenInAnAllShortBatch) {
  CommonMetadata m = batch({1, 1});
  m.is_prefilling = {0, 1};
  EXPECT_EQ(split_decodes_and_prefills(m, {.treat_short_extends_as_decodes = false}),
            (Split{1, 1, 1, 1}));
}

TEST(SplitPrefillingTest, UniformBatchesHaveNoPaddingRule) {
  CommonMetadata m = batch({3, 3, 0});
  m.is_prefilling = {0, 0, 0};
  const SplitOptions o{
      .decode_threshold = 4, .require_uniform = true, .treat_short_extends_as_decodes = false};
  EXPECT_EQ(split_decodes_and_prefills(m, o), (Split{2, 1, 6, 0}));
}

TEST(SplitFreshTest, PromptsWithoutComputedTokensArePrefills) {
  CommonMetadata m = batch({1, 2, 2, 0, 1});
  const SplitOptions fresh{.decode_threshold = 4, .fresh_prompts_are_prefills = true};
  EXPECT_EQ(split_decodes_and_prefills(m, fresh), (Split{5, 0, 6, 0}));
  m.seq_lens[2] = 2;
  EXPECT_EQ(split_decodes_and_prefills(m, fresh), (Split{2, 3, 3, 3}));
  EXPECT_EQ(split_decodes_and_prefills(m, {.decode_threshold = 4}), (Split{5, 0, 6, 0}));
  // Alone, too; a row without tokens is padding and no prompt.
  m = batch({2});
  m.seq_lens[0] = 2;
  EXPECT_EQ(split_decodes_and_prefills(m, fresh), (Split{0, 1, 0, 2}));
  m = batch({1, 0});
  m.seq_lens[1] = 0;
  EXPECT_EQ(split_decodes_and_prefills(m, fresh), (Split{2, 0, 1, 0}));
}

TEST(SplitErrorTest, RefusesBadInput) {
  CommonMetadata m = batch({1, 1});
  EXPECT_THROW(split_decodes_and_prefills(m, {.treat_short_extends_as_decodes = false}),
               InvalidArgument);
  EXPECT_THROW(split_decodes_and_prefills(m, {.decode_threshold = 0}), InvalidArgument);
}

}  // namespace
}  // namespace attend
