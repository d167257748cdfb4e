// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/fast_prefill.h"

#include <gmock/gmock.h>

#include <functional>

#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

/// Four requests: a decode, a finished prefill, a chunk without wanted logits, two drafted tokens.
CommonMetadata batch() {
  CommonMetadata m;
  m.query_start_loc = {0, 1, 6, 10, 13, 99};
  m.seq_lens = {30, 5, 40, 23, 99};
  m.num_reqs = 4;
  m.num_tokens = 13;
  m.max_query_len = 5;
  m.max_seq_len = 64;
  for (int t = 0; t < 13; ++t) {
    m.positions.push_back(100 + t);
    m.slot_mapping.push_back(t);
  }
  m.encoder_slot_mapping = {7, 8};
  m.is_prefilling = {0, 1, 1, 0};
  m.logits_indices = {0, 5, 10, 11, 12};
  return m;
}

TEST(FastPrefill, KeepsTheTokensWhoseLogitsAreWanted) {
  const CommonMetadata kept = make_kv_sharing_fast_prefill_metadata(batch());
  EXPECT_THAT(kept.query_start_loc, ElementsAre(0, 1, 2, 2, 5));
  EXPECT_THAT(kept.seq_lens, ElementsAre(30, 5, 40, 23));
  EXPECT_EQ(kept.num_reqs, 4);
  EXPECT_EQ(kept.num_tokens, 5);
  EXPECT_EQ(kept.max_query_len, 3);
  EXPECT_EQ(kept.max_seq_len, 64);
  EXPECT_TRUE(kept.causal);
  EXPECT_THAT(kept.positions, ElementsAre(100, 105, 110, 111, 112));
  EXPECT_THAT(kept.logits_indices, ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(kept.is_prefilling, ElementsAre(0, 1, 1, 0));
  EXPECT_THAT(kept.slot_mapping, IsEmpty());
  EXPECT_THAT(kept.encoder_slot_mapping, IsEmpty());
  EXPECT_NO_THROW(kept.validate());
}

TEST(FastPrefill, AllRequestsCausalByFlagIsCausal) {
  CommonMetadata m = batch();
  m.causal = false;
  m.request_causal = {1, 1, 1, 1};
  const CommonMetadata kept = make_kv_sharing_fast_prefill_metadata(m);
  EXPECT_TRUE(kept.causal);
  EXPECT_THAT(kept.request_causal, IsEmpty());
}

TEST(FastPrefill, DecodesComeBackAsTheyAre) {
  CommonMetadata m;
  m.query_start_loc = {0, 1, 2};
  m.seq_lens = {4, 9};
  m.num_reqs = m.num_tokens = 2;
  m.max_query_len = 1;
  m.max_seq_len = 9;
  m.slot_mapping = {3, 4};
  m.causal = false;
  const CommonMetadata same = make_kv_sharing_fast_prefill_metadata(m);
  EXPECT_THAT(same.slot_mapping, ElementsAre(3, 4));
  EXPECT_THAT(same.query_start_loc, ElementsAre(0, 1, 2));
  EXPECT_FALSE(same.causal);
}

TEST(FastPrefill, AnEmptyBatchStaysEmpty) {
  CommonMetadata m;
  m.query_start_loc = {0};
  m.max_query_len = 8;
  const CommonMetadata kept = make_kv_sharing_fast_prefill_metadata(m);
  EXPECT_THAT(kept.query_start_loc, ElementsAre(0));
  EXPECT_EQ(kept.num_tokens, 0);
}

TEST(FastPrefill, RefusesWhatWouldMoveAQuery) {
  struct Bad {
    const char* argument;
    std::function<void(CommonMetadata&)> change;
  };
  for (const Bad& bad : {
           Bad{"logits_indices", [](auto& m) { m.logits_indices.clear(); }},
           Bad{"logits_indices", [](auto& m) { m.logits_indices = {0, 4}; }},
           Bad{"logits_indices", [](auto& m) { m.logits_indices = {0, 3, 5}; }},
           Bad{"logits_indices", [](auto& m) { m.logits_indices = {0, 5, 4}; }},
           Bad{"logits_indices", [](auto& m) { m.logits_indices = {0, 5, 5}; }},
           Bad{"logits_indices", [](auto& m) { m.logits_indices = {5, 0}; }},
           Bad{"logits_indices", [](auto& m) { m.logits_indices = {12, 5}; }},
           Bad{"logits_indices", [](auto& m) { m.logits_indices = {0, 13}; }},
           Bad{"causal", [](auto& m) { m.causal = false; }},
           Bad{"request_causal", [](auto& m) { m.request_causal = {1, 1, 0, 1}; }},
           Bad{"query_start_loc", [](auto& m) { m.query_start_loc[0] = 1; }},
       }) {
    CommonMetadata m = batch();
    bad.change(m);
    try {
      make_kv_sharing_fast_prefill_metadata(m);
      ADD_FAILURE() << "no exception for a bad " << bad.argument;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), bad.argument) << e.what();
    }
  }
}

}  // namespace
}  // namespace attend
