// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/cascade.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

/// Decodes with block tables; every entry is another block until share() says otherwise.
struct Decodes {
  static constexpr int kWidth = 1024;
  std::vector<std::int32_t> query_start_loc{0}, seq_lens, table;
  int block_size = 16;
  CascadeInput in;

  explicit Decodes(int num_reqs, int seq_len) {
    for (int r = 0; r < num_reqs; ++r) {
      query_start_loc.push_back(r + 1);
      seq_lens.push_back(seq_len);
    }
    for (int i = 0; i < num_reqs * kWidth; ++i) table.push_back(i);
    in.batch.num_q_heads = 8;
    in.batch.num_kv_heads = 8;
    in.batch.head_dim_qk = in.batch.head_dim_v = 128;
    in.batch.num_workers = 2;
    in.batch.isa = IsaLevel::avx512;
  }
  void share(int begin, int end, int keys) {
    for (int r = begin; r < end; ++r)
      for (int b = 0; b < keys / block_size; ++b) at(r, b) = at(begin, b);
  }
  std::int32_t& at(int r, int b) { return table[static_cast<std::size_t>(r * kWidth + b)]; }
  CascadeDecision decide(CascadeMode mode) {
    in.mode = mode;
    in.batch.query_start_loc = query_start_loc;
    in.batch.seq_lens = seq_lens;
    in.block_size = block_size;
    in.block_table = {
        table.data(), DType::i32, {static_cast<std::int64_t>(seq_lens.size()), kWidth}};
    return decide_cascade(in);
  }
};

testing::Matcher<SharedPrefix> is_prefix(int begin, int end, int keys) {
  return testing::AllOf(testing::Field(&SharedPrefix::request_begin, begin),
                        testing::Field(&SharedPrefix::request_end, end),
                        testing::Field(&SharedPrefix::num_keys, keys));
}

TEST(CascadeGroups, AreFoundInTheTablesOuterOnesFirst) {
  Decodes d(9, 4000);
  d.share(0, 8, 512);
  d.share(1, 4, 1024);
  d.share(2, 4, 2048);
  d.share(6, 8, 800);
  const CascadeDecision decision = d.decide(CascadeMode::always);
  EXPECT_THAT(decision.prefixes, ElementsAre(is_prefix(0, 8, 512), is_prefix(1, 4, 1024),
                                             is_prefix(2, 4, 2048), is_prefix(6, 8, 768)));
  EXPECT_EQ(decision.reason, CascadeReason::always);
  d.in.batch.shared_prefixes = decision.prefixes;
  d.in.batch.isa.reset();  // the level that the costs are for need not be there
  EXPECT_NO_THROW(plan_attention(d.in.batch));
}

TEST(CascadeGroups, NeedAWholePieceAndTwoRequestsWithQueries) {
  Decodes d(3, 4000);
  d.share(0, 3, 240);
  EXPECT_EQ(d.decide(CascadeMode::always).reason, CascadeReason::nothing_shared);
  d.share(0, 3, 256);
  EXPECT_THAT(d.decide(CascadeMode::always).prefixes, ElementsAre(is_prefix(0, 3, 256)));
  d.query_start_loc = {0, 1, 1, 1};
  EXPECT_EQ(d.decide(CascadeMode::always).reason, CascadeReason::nothing_shared);
}

TEST(CascadeGroups, AreNoLongerThanTheShortestRequest) {
  Decodes d(3, 4000);
  d.share(0, 3, 2048);
  d.seq_lens[1] = 300;
  EXPECT_THAT(d.decide(CascadeMode::always).prefixes, ElementsAre(is_prefix(0, 3, 256)));
}

TEST(CascadeGroups, AreWholeBlocks) {
  Decodes d(2, 4000);
  d.block_size = 48;
  d.share(0, 2, 48 * 11);
  // 512 of the 528 keys are whole pieces: 11 blocks.
  EXPECT_THAT(d.decide(CascadeMode::always).prefixes, ElementsAre(is_prefix(0, 2, 528)));
  Decodes large(2, 4000);
  large.block_size = 384;
  large.share(0, 2, 384);
  EXPECT_THAT(large.decide(CascadeMode::always).prefixes, ElementsAre(is_prefix(0, 2, 384)));
}

TEST(CascadeGroups, NothingIsReadBeyondARequestsBlocks) {
  Decodes d(2, 512);
  d.table.resize(Decodes::kWidth + 32);  // the second row ends with its last block
  d.share(0, 2, 512);
  EXPECT_THAT(d.decide(CascadeMode::always).prefixes, ElementsAre(is_prefix(0, 2, 512)));
}

TEST(CascadeOff, SharesNothing) {
  Decodes d(8, 4000);
  d.share(0, 8, 2048);
  EXPECT_THAT(d.decide(CascadeMode::off).prefixes, IsEmpty());
  CascadeInput no_table = d.in;
  no_table.mode = CascadeMode::always;
  no_table.block_table = {};
  EXPECT_EQ(decide_cascade(no_table).reason, CascadeReason::no_block_table);
}

TEST(CascadeAutomatic, SharesWhereReadingOnceSaves) {
  Decodes d(64, 8400);
  d.share(0, 64, 8192);
  const CascadeDecision decision = d.decide(CascadeMode::automatic);
  EXPECT_THAT(decision.prefixes, ElementsAre(is_prefix(0, 64, 8192)));
  EXPECT_EQ(decision.reason, CascadeReason::gain);
  EXPECT_GT(decision.flat_us, 4 * decision.decided_us);
  EXPECT_THAT(describe(decision), HasSubstr("cascade over 8192 keys of requests 0..63"));
}

TEST(CascadeAutomatic, CountsTheTimeOfTheArithmetic) {
  Decodes d(64, 8400);
  d.in.batch.num_q_heads = 64;
  d.share(0, 64, 8192);
  const auto flat_us = [&](IsaLevel isa, Arithmetic arithmetic) {
    d.in.batch.isa = isa;
    d.in.batch.arithmetic = arithmetic;
    return d.decide(CascadeMode::automatic).flat_us;
  };
  const double exact = flat_us(IsaLevel::amx, Arithmetic::exact);
  EXPECT_EQ(exact, flat_us(IsaLevel::avx512_spr, Arithmetic::automatic));
  EXPECT_LT(flat_us(IsaLevel::amx, Arithmetic::fast), exact);
  EXPECT_THROW(flat_us(IsaLevel::avx512_spr, Arithmetic::fast), Unsupported);
}

TEST(CascadeAutomatic, StaysFlatWhereArithmeticBinds) {
  Decodes d(2, 8400);
  d.in.batch.num_q_heads = 128;  // 16 rows a request and kv head
  d.share(0, 2, 256);
  const CascadeDecision decision = d.decide(CascadeMode::automatic);
  EXPECT_THAT(decision.prefixes, IsEmpty());
  EXPECT_EQ(decision.reason, CascadeReason::no_gain);
  EXPECT_THAT(describe(decision), HasSubstr("flat: attending flat is expected to be as fast"));
}

TEST(CascadeAutomatic, StaysFlatWhereAWindowHidesThePrefix) {
  Decodes d(64, 9000);
  d.share(0, 64, 8192);
  d.in.batch.window_left = 500;
  EXPECT_EQ(d.decide(CascadeMode::automatic).reason, CascadeReason::no_gain);
  d.in.batch.window_left = 8999;
  EXPECT_EQ(d.decide(CascadeMode::automatic).reason, CascadeReason::gain);
}

TEST(CascadeAutomatic, LeavesOutRequestsWithManyQueries) {
  Decodes d(34, 9000);
  d.share(0, 34, 8192);
  d.query_start_loc.back() = 33 + 2000;
  EXPECT_THAT(d.decide(CascadeMode::automatic).prefixes, ElementsAre(is_prefix(0, 33, 8192)));
  EXPECT_THAT(d.decide(CascadeMode::always).prefixes, ElementsAre(is_prefix(0, 34, 8192)));
}

TEST(CascadeAutomatic, DecidesEachGroupForItself) {
  Decodes d(40, 12000);
  d.share(0, 32, 4096);
  d.share(32, 34, 256);
  const CascadeDecision decision = d.decide(CascadeMode::automatic);
  ASSERT_FALSE(decision.prefixes.empty());
  EXPECT_THAT(decision.prefixes.front(), is_prefix(0, 32, 4096));
  EXPECT_EQ(decision.reason, CascadeReason::gain);
}

TEST(CascadeVllm, FollowsTheRule) {
  Decodes d(8, 4000);
  d.in.batch.num_kv_heads = 2;
  d.in.common_prefix_len = 2048;
  const auto reason = [&] { return d.decide(CascadeMode::vllm).reason; };
  // 16 key tiles; shared: ceil(8 heads / 2 workers) * 16 waves, flat: ceil(8 * 2 * 16 / 2).
  EXPECT_EQ(reason(), CascadeReason::fewer_waves);
  EXPECT_THAT(d.decide(CascadeMode::vllm).prefixes, ElementsAre(is_prefix(0, 8, 2048)));
  d.in.batch.num_workers = 200;  // 16 waves against 2
  EXPECT_EQ(reason(), CascadeReason::not_fewer_waves);
  EXPECT_THAT(d.decide(CascadeMode::vllm).prefixes, IsEmpty());
  d.in.batch.num_kv_heads = 8;  // not grouped
  EXPECT_EQ(reason(), CascadeReason::more_than_decodes);
  d.in.common_prefix_len = 240;
  EXPECT_EQ(reason(), CascadeReason::short_prefix);
  d.in.common_prefix_len = 256;
  d.in.use_alibi = true;
  EXPECT_EQ(reason(), CascadeReason::alibi);
  d.in.use_alibi = false;
  d.in.batch.window_left = 4096;
  EXPECT_EQ(reason(), CascadeReason::window);
  d.in.batch.window_left = -1;
  d.query_start_loc.pop_back();
  d.seq_lens.pop_back();
  EXPECT_EQ(reason(), CascadeReason::few_requests);
}

TEST(CascadeMode, NamesAreParsed) {
  for (const CascadeMode mode :
       {CascadeMode::automatic, CascadeMode::vllm, CascadeMode::off, CascadeMode::always})
    EXPECT_EQ(parse_cascade_mode(to_string(mode)), mode);
  EXPECT_EQ(parse_cascade_mode("on"), std::nullopt);
}

}  // namespace
}  // namespace attend
