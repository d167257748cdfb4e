// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/local_attention.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "attend/core/error.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

/// A batch with its block table: entry b of request r is 100 r + b, garbage behind the last block.
struct Batch {
  HostTensor table;
  CommonMetadata m;

  Batch(const std::vector<int>& query_lens, const std::vector<int>& seq_lens, int block_size,
        int width)
      : table(DType::i32, {static_cast<std::int64_t>(seq_lens.size()) + 1, width}) {
    m.query_start_loc = {0};
    m.num_reqs = static_cast<int>(seq_lens.size());
    table.fill_bytes(0x55);
    for (int r = 0; r < m.num_reqs; ++r) {
      const auto i = static_cast<std::size_t>(r);
      const int query_len = query_lens[i], seq_len = seq_lens[i];
      m.query_start_loc.push_back(m.query_start_loc.back() + query_len);
      m.seq_lens.push_back(seq_len);
      m.is_prefilling.push_back(r % 2 == 0 ? 1 : 0);
      m.max_query_len = std::max(m.max_query_len, query_len);
      m.max_seq_len = std::max(m.max_seq_len, seq_len);
      for (int b = 0; b < (seq_len + block_size - 1) / block_size; ++b) {
        table
            .as<std::int32_t>()[i * static_cast<std::size_t>(width) + static_cast<std::size_t>(b)] =
            100 * r + b;
      }
      for (int p = seq_len - query_len; p < seq_len; ++p) {
        m.positions.push_back(p);
        m.slot_mapping.push_back((100 * r + p / block_size) * block_size + p % block_size);
      }
    }
    m.num_tokens = m.query_start_loc.back();
    m.block_table = table;
    if (m.num_tokens > 0) m.logits_indices = {m.num_tokens - 1};
  }
};

TEST(LocalAttention, CutsRequestsAtMultiplesOfTheChunk) {
  // Contexts of 2, 7 and 4 tokens in chunks of 4, blocks of 2.
  Batch b({4, 10, 5}, {6, 17, 9}, 2, 9);
  const LocalAttentionBatch local = make_local_attention_virtual_batches(4, 2, b.m);
  const CommonMetadata& v = local.common;
  EXPECT_EQ(v.num_reqs, 8);
  EXPECT_EQ(v.num_tokens, 19);
  EXPECT_THAT(v.query_start_loc, ElementsAre(0, 2, 4, 5, 9, 13, 14, 18, 19));
  EXPECT_THAT(v.seq_lens, ElementsAre(4, 2, 4, 4, 4, 1, 4, 1));
  EXPECT_THAT(local.request_of, ElementsAre(0, 0, 1, 1, 1, 1, 2, 2));
  EXPECT_THAT(local.block_table,
              ElementsAre(0, 1, 2, -1, 102, 103, 104, 105, 106, 107, 108, -1, 202, 203, 204, -1));
  EXPECT_EQ(v.block_table.data, local.block_table.data());
  EXPECT_EQ(v.block_table.shape[0], 8);
  EXPECT_EQ(v.block_table.shape[1], 2);
  EXPECT_EQ(v.max_query_len, 4);
  EXPECT_EQ(v.max_seq_len, 4);
  EXPECT_TRUE(v.causal);
  EXPECT_THAT(v.is_prefilling, ElementsAre(1, 1, 0, 0, 0, 0, 1, 1));
  EXPECT_EQ(v.slot_mapping, b.m.slot_mapping);
  EXPECT_EQ(v.positions, b.m.positions);
  EXPECT_EQ(v.logits_indices, b.m.logits_indices);
  EXPECT_NO_THROW(v.validate(2));
}

/// Every token by itself: where it stands in its virtual request and which slots it sees there.
void expect_every_token_sees_its_chunk(const Batch& b, const LocalAttentionBatch& local, int chunk,
                                       int block_size) {
  const CommonMetadata& v = local.common;
  for (int r = 0, token = 0; r < b.m.num_reqs; ++r) {
    const int seq_len = b.m.seq_lens[static_cast<std::size_t>(r)];
    for (int p = b.m.num_computed_tokens(r); p < seq_len; ++p, ++token) {
      const auto above =
          std::upper_bound(v.query_start_loc.begin(), v.query_start_loc.end(), token);
      const auto owner = static_cast<std::size_t>(above - v.query_start_loc.begin()) - 1;
      ASSERT_EQ(local.request_of[owner], r);
      const int at = v.num_computed_tokens(static_cast<int>(owner)) + token -
                     v.query_start_loc[owner];  // its own key is the last one that it sees
      ASSERT_EQ(at, p % chunk) << "request " << r << " position " << p;
      const ConstTensorView& table = v.block_table;
      for (int j = 0; j <= at; ++j) {
        const int real = p / chunk * chunk + j;
        ASSERT_EQ(table.as<std::int32_t>()[static_cast<std::int64_t>(owner) * table.strides[0] +
                                           j / block_size],
                  100 * r + real / block_size);
        ASSERT_EQ(j % block_size, real % block_size);
      }
    }
  }
}

TEST(LocalAttention, EveryTokenSeesItsChunkUpToItself) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  for (int i = 0; i < 300 && !::testing::Test::HasFatalFailure(); ++i) {
    const int block_size = static_cast<int>(rng.integer(1, 6));
    const int chunk = block_size * static_cast<int>(rng.integer(1, 7));
    std::vector<int> query_lens, seq_lens;
    int longest = 1;
    for (std::int64_t r = rng.integer(0, 5); r > 0; --r) {
      query_lens.push_back(
          static_cast<int>(rng.chance(0.3) ? rng.integer(0, 1) : rng.integer(0, 60)));
      const std::int64_t context = rng.chance(0.3) ? chunk * rng.integer(0, 3) : rng.integer(0, 80);
      seq_lens.push_back(query_lens.back() + static_cast<int>(context));
      longest = std::max(longest, seq_lens.back());
    }
    const int blocks = (longest + block_size - 1) / block_size;
    const Batch b(query_lens, seq_lens, block_size, blocks + static_cast<int>(rng.integer(0, 2)));
    const LocalAttentionBatch local = make_local_attention_virtual_batches(chunk, block_size, b.m);
    const CommonMetadata& v = local.common;
    ASSERT_NO_THROW(v.validate(block_size));
    ASSERT_EQ(v.num_tokens, b.m.num_tokens);
    for (int virtual_request = 0; virtual_request < v.num_reqs; ++virtual_request) {
      ASSERT_LE(v.seq_lens[static_cast<std::size_t>(virtual_request)], chunk);
    }
    for (int r = 0; r < b.m.num_reqs; ++r) {  // none is lost
      ASSERT_TRUE(std::count(local.request_of.begin(), local.request_of.end(), r) > 0);
    }
    expect_every_token_sees_its_chunk(b, local, chunk, block_size);
  }
}

TEST(LocalAttention, RequestsWithoutQueriesStay) {
  const Batch b({0, 0, 3}, {0, 8, 3}, 2, 4);
  const LocalAttentionBatch local = make_local_attention_virtual_batches(4, 2, b.m);
  EXPECT_THAT(local.request_of, ElementsAre(0, 1, 2));
  EXPECT_THAT(local.common.query_start_loc, ElementsAre(0, 0, 0, 3));
  EXPECT_THAT(local.common.seq_lens, ElementsAre(0, 4, 3));
}

TEST(LocalAttention, AChunkLongerThanEveryRequestChangesNothing) {
  const Batch b({4, 1}, {6, 17}, 2, 9);
  const LocalAttentionBatch local = make_local_attention_virtual_batches(1 << 30, 2, b.m);
  EXPECT_EQ(local.common.query_start_loc, b.m.query_start_loc);
  EXPECT_EQ(local.common.seq_lens, b.m.seq_lens);
  EXPECT_EQ(local.common.block_table.shape[1], 9);
}

TEST(LocalAttention, PaddingAndFieldsOfOtherLayersAreDropped) {
  Batch b({4}, {6}, 2, 3);
  b.m.query_start_loc.push_back(99);
  b.m.seq_lens.push_back(99);
  b.m.positions.push_back(99);
  b.m.slot_mapping.push_back(-1);
  b.m.encoder_seq_lens = {5};
  b.m.encoder_slot_mapping = {1, 2};
  b.m.request_causal = {1};
  b.m.causal = false;
  const LocalAttentionBatch local = make_local_attention_virtual_batches(4, 2, b.m);
  EXPECT_EQ(local.common.num_reqs, 2);
  EXPECT_EQ(local.common.positions.size(), 4U);
  EXPECT_EQ(local.common.slot_mapping.size(), 4U);
  EXPECT_THAT(local.common.encoder_seq_lens, IsEmpty());
  EXPECT_THAT(local.common.encoder_slot_mapping, IsEmpty());
  EXPECT_THAT(local.common.request_causal, IsEmpty());
  EXPECT_TRUE(local.common.causal);
}

TEST(LocalAttention, MovingKeepsTheTable) {
  const Batch b({4}, {6}, 2, 3);
  LocalAttentionBatch first = make_local_attention_virtual_batches(4, 2, b.m);
  const LocalAttentionBatch second = std::move(first);
  EXPECT_EQ(second.common.block_table.data, second.block_table.data());
}

TEST(LocalAttention, AnEmptyBatchStaysEmpty) {
  const Batch b({}, {}, 2, 3);
  const LocalAttentionBatch local = make_local_attention_virtual_batches(4, 2, b.m);
  EXPECT_EQ(local.common.num_reqs, 0);
  EXPECT_THAT(local.common.query_start_loc, ElementsAre(0));
}

TEST(LocalAttention, RefusesBadInput) {
  struct Bad {
    const char* argument;
    std::function<void(CommonMetadata&, int& chunk, int& block)> change;
  };
  for (const Bad& bad : {
           Bad{"chunk_size", [](auto&, int& chunk, int&) { chunk = 0; }},
           Bad{"chunk_size", [](auto&, int& chunk, int&) { chunk = -4; }},
           Bad{"chunk_size", [](auto&, int& chunk, int&) { chunk = 5; }},
           Bad{"block_size", [](auto&, int&, int& block) { block = 0; }},
           Bad{"block_size", [](auto&, int&, int& block) { block = -2; }},
           Bad{"block_table", [](auto& m, int&, int&) { m.block_table = {}; }},
           Bad{"block_table", [](auto& m, int&, int&) { m.block_table.shape[1] = 2; }},
           Bad{"seq_lens", [](auto& m, int&, int&) { m.seq_lens[0] = 3; }},
           Bad{"causal", [](auto& m, int&, int&) { m.causal = false; }},
           Bad{"request_causal", [](auto& m, int&, int&) { m.request_causal = {0}; }},
           Bad{"dcp_local_seq_lens", [](auto& m, int&, int&) { m.dcp_local_seq_lens = {3}; }},
       }) {
    Batch b({4}, {6}, 2, 3);
    int chunk = 4, block = 2;
    bad.change(b.m, chunk, block);
    try {
      make_local_attention_virtual_batches(chunk, block, b.m);
      ADD_FAILURE() << "no exception for a bad " << bad.argument;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), bad.argument) << e.what();
    }
  }
}

}  // namespace
}  // namespace attend::testing
