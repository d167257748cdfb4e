// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "dist/dcp_differential_problem.h"
#include "support/scale.h"

namespace attend {
namespace {

using testing::DcpDifferentialProblem;
using testing::DcpDifferentialShape;
using testing::Rng;

constexpr auto kHalves = HeadPairing::halves;
constexpr auto kV2 = DifferentialVariant::v2;

/// Decodes, short extends and requests without context, mixed.
DcpDifferentialShape mixed_pairs(DType dtype, int ranks, int interleave) {
  DcpDifferentialShape s;
  s.base.dtype = dtype;
  s.base.layout = {ranks, interleave};
  s.base.kv_heads = 4;
  s.base.heads_a_rank = ranks == 1 ? 8 : 4;
  s.base.dim = 16;
  s.base.context_lens = {0, 1, 15, 17, 129, 300, 0, 64};
  s.base.query_lens = {1, 1, 2, 3, 1, 5, 4, 2};
  return s;
}

void expect_within_bounds(const DcpDifferentialProblem& p) {
  const oracle::Result want = testing::expected(p);
  const int pairs = p.shape.base.heads_a_rank / 2, width = p.width();
  std::size_t i = 0, row = 0;
  for (std::int64_t t = 0; t < p.maps.tokens; ++t) {
    for (int pair = 0; pair < p.heads() / 2; ++pair) {
      SCOPED_TRACE("token " + std::to_string(t) + " pair " + std::to_string(pair));
      const TensorView lse = p.lse[static_cast<std::size_t>(pair / pairs)];
      for (int map = 0; map < 2; ++map, ++row)
        ASSERT_NEAR(testing::get(lse, {t, p.head_of_rank(pair % pairs, map)}), want.lse[row],
                    want.lse_bound[row])
            << "map " << map;
      for (int d = 0; d < width; ++d, ++i) {
        const int head = pair * width / p.shape.base.dim + d / p.shape.base.dim;
        ASSERT_NEAR(testing::get(p.out.view(), {t, head, d % p.shape.base.dim}), want.out[i],
                    want.out_bound[i])
            << "column " << d;
      }
    }
  }
}

/// Bytes of all results.
std::vector<std::vector<unsigned char>> results(const DcpDifferentialProblem& p) {
  std::vector<std::vector<unsigned char>> all{p.out.snapshot()};
  for (const auto& t : p.lse) all.push_back(t.snapshot());
  return all;
}

class DcpDifferentialTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Types, DcpDifferentialTest,
                         ::testing::Values(DType::f32, DType::f16, DType::bf16));

TEST_P(DcpDifferentialTest, EqualsOneRankWithinTheBound) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (const int ranks : {1, 2, 4, 8}) {
    for (const int interleave : {1, 16}) {
      SCOPED_TRACE("N " + std::to_string(ranks) + " I " + std::to_string(interleave));
      DcpDifferentialShape s = mixed_pairs(GetParam(), ranks, interleave);
      if (interleave == 16) s.pairing = kHalves;
      DcpDifferentialProblem p(s, rng);
      p.run(DcpCombine::all_gather_reduce_scatter);
      ASSERT_NO_FATAL_FAILURE(expect_within_bounds(p));
      const auto first = results(p);
      p.run(DcpCombine::all_to_all);
      EXPECT_EQ(results(p), first);
    }
  }
}

TEST_P(DcpDifferentialTest, RandomShapes) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  for (int round = 0; round < testing::scaled(12, 3); ++round) {
    DcpDifferentialShape s;
    s.base.dtype = GetParam();
    s.base.layout = {static_cast<int>(rng.integer(1, 6)), rng.pick(std::array{1, 2, 4, 8})};
    s.base.block_size = rng.pick(std::array{8, 16, 32});
    if (rng.chance(0.25)) s.variant = kV2;
    if (s.variant != kV2 && rng.chance(0.5)) s.pairing = kHalves;
    s.norm = rng.chance(0.6);
    const int step = s.variant == kV2 ? 1 : 2;
    s.base.heads_a_rank = 2 * static_cast<int>(rng.integer(1, 3));
    do {
      s.base.kv_heads = step * static_cast<int>(rng.integer(1, 4));
    } while (s.base.heads() / 2 % (s.base.kv_heads / step) != 0);
    s.base.dim = 8 * static_cast<int>(rng.integer(1, 5));
    s.base.causal = rng.chance(0.7);
    if (rng.chance(0.3)) s.base.softcap = 5.0F;
    for (auto n = rng.integer(1, 5); n > 0; --n) {
      s.base.context_lens.push_back(rng.chance(0.3) ? 0 : static_cast<int>(rng.integer(1, 300)));
      s.base.query_lens.push_back(rng.chance(0.5) ? 1 : static_cast<int>(rng.integer(0, 7)));
    }
    DcpDifferentialProblem p(s, rng);
    p.run(rng.chance(0.5) ? DcpCombine::all_to_all : DcpCombine::all_gather_reduce_scatter);
    ASSERT_NO_FATAL_FAILURE(expect_within_bounds(p)) << "round " << round;
  }
}

TEST(DcpDifferential, PairsOfARankThatCutThroughAGroup) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  // Groups of 2 pairs: rank 0 has pairs 0 1 | 2, rank 1 has 3 | 4 5.
  for (const HeadPairing pairing : {HeadPairing::interleaved, kHalves}) {
    DcpDifferentialShape s = mixed_pairs(DType::bf16, 2, 4);
    s.base.kv_heads = 6;
    s.base.heads_a_rank = 6;
    s.pairing = pairing;
    DcpDifferentialProblem p(s, rng);
    p.run(DcpCombine::all_to_all);
    expect_within_bounds(p);
  }
}

TEST(DcpDifferential, CausalityOfEachRequest) {
  Rng rng(4);
  SCOPED_TRACE(rng.trace());
  for (const bool causal : {false, true}) {
    DcpDifferentialShape s = mixed_pairs(DType::f32, 4, 1);
    s.base.causal = causal;  // overruled by the flags
    s.base.request_causal = {1, 0, 0, 1, 0, 1, 0, 0};
    DcpDifferentialProblem p(s, rng);
    p.run(DcpCombine::all_gather_reduce_scatter);
    expect_within_bounds(p);
  }
}

std::vector<unsigned char> bytes_of(const TensorView& t) {
  const auto* data = static_cast<const unsigned char*>(t.data);
  return {data, data + static_cast<std::size_t>(t.numel()) * size_of(t.dtype)};
}

TEST_P(DcpDifferentialTest, WithoutContextTheBitsAreThoseOfOneRank) {
  Rng rng(5);
  SCOPED_TRACE(rng.trace());
  for (const bool halves : {false, true}) {
    DcpDifferentialShape s = mixed_pairs(GetParam(), 4, 16);
    if (halves) s.pairing = kHalves;
    DcpDifferentialProblem p(s, rng);
    p.run(DcpCombine::all_gather_reduce_scatter);
    const auto one = make_thread_pool(1);
    differential_attention(p.whole(), one.get());
    int compared = 0;
    for (std::size_t r = 0; r < s.base.query_lens.size(); ++r) {
      if (s.base.context_lens[r] > 0) continue;
      for (int i = 0; i < s.base.query_lens[r]; ++i, ++compared) {
        const std::int64_t t = p.maps.query_start_loc.as<std::int32_t>()[r] + i;
        EXPECT_EQ(bytes_of(p.out.view().select(0, t)), bytes_of(p.whole_out.view().select(0, t)));
      }
    }
    EXPECT_EQ(compared, 5);
  }
}

TEST_P(DcpDifferentialTest, ARequestAloneHasTheBitsOfTheBatch) {
  Rng rng(6);
  SCOPED_TRACE(rng.trace());
  DcpDifferentialShape s = mixed_pairs(GetParam(), 4, 16);
  s.pairing = kHalves;
  DcpDifferentialProblem p(s, rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto batch = results(p);
  p.out.fill_bytes(0xFF);
  for (auto& t : p.lse) t.fill_bytes(0xFF);
  // Each request's call writes its own rows, so that together they must give the batch's memory.
  for (std::size_t r = 0; r < s.base.query_lens.size(); ++r) {
    const auto request = static_cast<std::int64_t>(r);
    const std::int64_t first = p.maps.query_start_loc.as<std::int32_t>()[r];
    const std::int64_t count = s.base.query_lens[r];
    const testing::HostTensor start(DType::i32, {2});
    start.as<std::int32_t>()[1] = s.base.query_lens[r];
    run_in_process(4, [&](Communicator& c) {
      const auto one = make_thread_pool(1);
      DcpDifferentialAttentionArgs a = p.args(c.rank());
      for (ConstTensorView* t : {&a.q, &a.k_new, &a.v_new}) *t = t->slice(0, first, count);
      for (TensorView* t : {&a.out, &a.lse}) *t = t->slice(0, first, count);
      a.query_start_loc = start;
      a.seq_lens = a.seq_lens.slice(0, request, 1);
      a.block_table = a.block_table.slice(0, request, 1);
      dcp_differential_attention(a, c, one.get());
    });
  }
  EXPECT_EQ(results(p), batch);
}

TEST_P(DcpDifferentialTest, RerunsAndThreadsGiveTheSameBits) {
  Rng rng(7);
  SCOPED_TRACE(rng.trace());
  DcpDifferentialProblem p(mixed_pairs(GetParam(), 4, 1), rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto first = results(p);
  for (int round = 0; round < testing::scaled(5, 2); ++round) {
    p.run(round % 2 == 0 ? DcpCombine::all_to_all : DcpCombine::all_gather_reduce_scatter,
          1 + round % 3);
    EXPECT_EQ(results(p), first);
  }
}

TEST(DcpDifferential, TheDefaultExecutorServesAllRanksAndTheLseIsOptional) {
  Rng rng(8);
  SCOPED_TRACE(rng.trace());
  DcpDifferentialShape s = mixed_pairs(DType::f32, 2, 8);
  s.variant = kV2;
  DcpDifferentialProblem p(s, rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto out = p.out.snapshot();
  p.out.fill_bytes(0xFF);
  run_in_process(2, [&](Communicator& c) {
    DcpDifferentialAttentionArgs a = p.args(c.rank());
    a.lse = {};
    dcp_differential_attention(a, c);
  });
  EXPECT_EQ(p.out.snapshot(), out);
}

TEST(DcpDifferential, AnEmptyBatch) {
  Rng rng(9);
  DcpDifferentialShape s = mixed_pairs(DType::f32, 2, 1);
  for (const int num_reqs : {0, 2}) {
    s.base.context_lens.assign(static_cast<std::size_t>(num_reqs), 7);
    s.base.query_lens.assign(static_cast<std::size_t>(num_reqs), 0);
    DcpDifferentialProblem p(s, rng);
    EXPECT_NO_THROW(p.run(DcpCombine::all_to_all));
    EXPECT_NO_THROW(p.run(DcpCombine::all_gather_reduce_scatter));
  }
}

}  // namespace
}  // namespace attend
