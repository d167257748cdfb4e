// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/common_metadata.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

// Three requests with 1, 3 and 2 query tokens over 33, 3 and 18 keys; one padding request and two
// padding tokens behind them.
class CommonMetadataTest : public ::testing::Test {
 protected:
  CommonMetadataTest() {
    m_.num_reqs = 3;
    m_.num_tokens = 6;
    m_.query_start_loc = {0, 1, 4, 6, 6};
    m_.seq_lens = {33, 3, 18, 0};
    m_.max_query_len = 5;
    m_.max_seq_len = 64;
    m_.block_table = ConstTensorView(table_.data(), DType::i32, {4, 3});
    m_.slot_mapping = {32, 0, 1, 2, 64, 65, -1, -1};
    m_.positions = {32, 0, 1, 2, 16, 17, 0, 0};
    m_.request_causal = {1, 0, 1, 0};
    m_.is_prefilling = {0, 1, 1, 0};
    m_.encoder_seq_lens = {4, 0, 2, 0};
    m_.encoder_slot_mapping = {8, 9, -1};
    m_.dcp_local_seq_lens = {17, 2, 9, 0};
    m_.logits_indices = {0, 3, 5};
  }

  // What validate() says after `change`, e.g. "slot_mapping: -2 at index 1".
  std::string error_after(const std::function<void(CommonMetadata&)>& change, int block_size = 16) {
    CommonMetadata m = m_;
    change(m);
    try {
      m.validate(block_size);
    } catch (const InvalidArgument& e) {
      const std::string text = e.what();
      return e.argument() + ": " + text.substr(text.find("got ") + 4);
    }
    return "valid";
  }

  std::vector<std::int32_t> table_ = std::vector<std::int32_t>(12);
  CommonMetadata m_;
};

TEST_F(CommonMetadataTest, AcceptsAGoodBatch) {
  EXPECT_NO_THROW(m_.validate(16));
  EXPECT_NO_THROW(m_.validate());
  CommonMetadata empty;
  empty.query_start_loc = {0};
  EXPECT_NO_THROW(empty.validate(16));
}

TEST_F(CommonMetadataTest, EncoderNeedsNeitherTableNorSlots) {
  EXPECT_EQ(error_after([](auto& m) {
              m.block_table = {};
              m.slot_mapping.clear();
            }),
            "valid");
}

TEST_F(CommonMetadataTest, DerivedLengths) {
  EXPECT_EQ(m_.query_len(1), 3);
  EXPECT_EQ(m_.num_computed_tokens(0), 32);
  EXPECT_EQ(m_.num_computed_tokens(1), 0);
  EXPECT_THAT(m_.key_start_loc(), ElementsAre(0, 33, 36, 54));
}

TEST_F(CommonMetadataTest, KeyStartLocRefusesToOverflow) {
  m_.seq_lens = {INT32_MAX, 1, 0};
  EXPECT_THROW(m_.key_start_loc(), InvalidArgument);
}

TEST_F(CommonMetadataTest, RefusesBadQueryStarts) {
  EXPECT_EQ(error_after([](auto& m) { m.query_start_loc[0] = 1; }), "query_start_loc: 1");
  EXPECT_EQ(error_after([](auto& m) { m.query_start_loc[2] = 0; }),
            "query_start_loc: 0 after 1 at index 2");
  EXPECT_EQ(error_after([](auto& m) { m.query_start_loc[3] = 5; }), "query_start_loc: 5");
  EXPECT_EQ(error_after([](auto& m) { m.query_start_loc.resize(3); }), "query_start_loc: 3");
  EXPECT_EQ(error_after([](auto& m) { m.query_start_loc.clear(); }), "query_start_loc: 0");
  EXPECT_EQ(error_after([](auto& m) { m.max_query_len = 2; }), "max_query_len: 2");
}

TEST_F(CommonMetadataTest, RefusesBadCounts) {
  EXPECT_EQ(error_after([](auto& m) { m.num_reqs = -1; }), "num_reqs: -1");
  EXPECT_EQ(error_after([](auto& m) { m.num_tokens = -1; }), "num_tokens: -1");
  EXPECT_EQ(error_after([](auto& m) { m.max_query_len = -1; }), "max_query_len: -1");
  EXPECT_EQ(error_after([](auto& m) { m.max_seq_len = -1; }), "max_seq_len: -1");
}

TEST_F(CommonMetadataTest, RefusesBadSeqLens) {
  EXPECT_EQ(error_after([](auto& m) { m.seq_lens[1] = 2; }), "seq_lens: 2 at index 1");
  EXPECT_EQ(error_after([](auto& m) { m.seq_lens[0] = -7; }), "seq_lens: -7 at index 0");
  EXPECT_EQ(error_after([](auto& m) { m.seq_lens.resize(2); }), "seq_lens: 2");
  EXPECT_EQ(error_after([](auto& m) { m.max_seq_len = 32; }), "max_seq_len: 32");
}

TEST_F(CommonMetadataTest, RefusesBadBlockTables) {
  EXPECT_EQ(error_after([](auto& m) { m.block_table.dtype = DType::i64; }),
            "block_table: [4, 3] i64 cpu:0");
  EXPECT_EQ(error_after([](auto& m) { m.block_table = m.block_table.select(0, 0); }),
            "block_table: [3] i32 cpu:0");
  EXPECT_EQ(error_after([](auto& m) { m.block_table.shape[0] = 2; }),
            "block_table: [2, 3] i32 cpu:0");
  EXPECT_EQ(error_after([](auto& m) { m.block_table.strides = {1, 4}; }),
            "block_table: [4, 3] i32 cpu:0 with strides [1, 4]");
  const auto narrow = [](auto& m) { m.block_table.shape[1] = 2; };  // 32 of 33 keys
  EXPECT_EQ(error_after(narrow, 16), "block_table: [4, 2] i32 cpu:0");
  EXPECT_EQ(error_after(narrow, 17), "valid");
  EXPECT_EQ(error_after(narrow, 0), "valid");
}

TEST_F(CommonMetadataTest, RefusesBadSlots) {
  EXPECT_EQ(error_after([](auto& m) { m.slot_mapping.resize(5); }), "slot_mapping: 5");
  EXPECT_EQ(error_after([](auto& m) { m.slot_mapping[1] = -2; }), "slot_mapping: -2 at index 1");
  EXPECT_EQ(error_after([](auto& m) { m.slot_mapping[7] = -2; }), "valid") << "padding";
}

TEST_F(CommonMetadataTest, RefusesBadOptionalFields) {
  EXPECT_EQ(error_after([](auto& m) { m.request_causal.resize(2); }), "request_causal: 2");
  EXPECT_EQ(error_after([](auto& m) { m.request_causal[2] = 2; }), "request_causal: 2 at index 2");
  EXPECT_EQ(error_after([](auto& m) { m.is_prefilling.resize(1); }), "is_prefilling: 1");
  EXPECT_EQ(error_after([](auto& m) { m.positions.resize(5); }), "positions: 5");
  EXPECT_EQ(error_after([](auto& m) { m.positions[4] = -1; }), "positions: -1 at index 4");
  EXPECT_EQ(error_after([](auto& m) { m.encoder_seq_lens[0] = -1; }),
            "encoder_seq_lens: -1 at index 0");
  EXPECT_EQ(error_after([](auto& m) { m.encoder_slot_mapping = {3, -1, -2}; }),
            "encoder_slot_mapping: -2 at index 2");
  EXPECT_EQ(error_after([](auto& m) { m.dcp_local_seq_lens[1] = 4; }),
            "dcp_local_seq_lens: 4 at index 1");
  EXPECT_EQ(error_after([](auto& m) { m.logits_indices[1] = 6; }), "logits_indices: 6 at index 1");
}

TEST_F(CommonMetadataTest, UnpaddedCutsEveryField) {
  const CommonMetadata u = m_.unpadded(4, 2);
  EXPECT_EQ(u.num_reqs, 2);
  EXPECT_EQ(u.num_tokens, 4);
  EXPECT_THAT(u.query_start_loc, ElementsAre(0, 1, 4));
  EXPECT_THAT(u.seq_lens, ElementsAre(33, 3));
  EXPECT_THAT(u.slot_mapping, ElementsAre(32, 0, 1, 2));
  EXPECT_THAT(u.positions, ElementsAre(32, 0, 1, 2));
  EXPECT_THAT(u.request_causal, ElementsAre(1, 0));
  EXPECT_THAT(u.is_prefilling, ElementsAre(0, 1));
  EXPECT_THAT(u.encoder_seq_lens, ElementsAre(4, 0));
  EXPECT_THAT(u.encoder_slot_mapping, ElementsAre(8, 9, -1)) << "rows of the encoder, not of T";
  EXPECT_THAT(u.dcp_local_seq_lens, ElementsAre(17, 2));
  EXPECT_THAT(u.logits_indices, ElementsAre(0, 3));
  EXPECT_EQ(u.block_table.shape[0], 2);
  EXPECT_EQ(u.block_table.data, table_.data());
  EXPECT_EQ(u.max_seq_len, 64);
  EXPECT_NO_THROW(u.validate(16));
}

TEST_F(CommonMetadataTest, UnpaddedKeepsAbsentFieldsAbsent) {
  CommonMetadata m;
  m.num_reqs = 2;
  m.num_tokens = 2;
  m.query_start_loc = {0, 1, 2};
  m.seq_lens = {1, 1};
  const CommonMetadata u = m.unpadded(1, 1);
  EXPECT_THAT(u.positions, IsEmpty());
  EXPECT_THAT(u.request_causal, IsEmpty());
  EXPECT_FALSE(u.block_table.defined());
}

TEST_F(CommonMetadataTest, UnpaddedCannotGrow) {
  EXPECT_THROW(m_.unpadded(7, 3), InvalidArgument);
  EXPECT_THROW(m_.unpadded(6, 4), InvalidArgument);
  EXPECT_THROW(m_.unpadded(-1, 3), InvalidArgument);
}

}  // namespace
}  // namespace attend
