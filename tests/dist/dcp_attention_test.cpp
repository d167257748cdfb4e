// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>

#include "dist/dcp_problem.h"
#include "support/scale.h"

namespace attend {
namespace {

using testing::DcpProblem;
using testing::DcpShape;
using testing::Rng;

/// Decodes, short extends and requests without context, mixed.
DcpShape mixed_shape(DType dtype, int ranks, int interleave) {
  DcpShape s;
  s.dtype = dtype;
  s.layout = {ranks, interleave};
  s.kv_heads = 2;
  s.heads_a_rank = 2;
  s.dim = 32;
  s.dim_v = 16;
  s.context_lens = {0, 1, 15, 16, 17, 129, 300, 0, 700, 64};
  s.query_lens = {1, 1, 2, 1, 3, 1, 5, 4, 1, 2};
  return s;
}

void expect_within_bounds(const DcpProblem& p) {
  const oracle::Result want = testing::expected(p);
  const int heads = p.shape.heads();
  std::size_t i = 0;
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    for (int h = 0; h < heads; ++h) {
      const auto row = static_cast<std::size_t>(t * heads + h);
      ASSERT_NEAR(testing::get(p.lse.view(), {t, h}), want.lse[row], want.lse_bound[row])
          << "token " << t << " head " << h;
      for (int d = 0; d < p.shape.dim_v; ++d, ++i) {
        ASSERT_NEAR(testing::get(p.out.view(), {t, h, d}), want.out[i], want.out_bound[i])
            << "token " << t << " head " << h << " dim " << d;
      }
    }
  }
}

class DcpAttentionTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Types, DcpAttentionTest,
                         ::testing::Values(DType::f32, DType::f16, DType::bf16));

TEST_P(DcpAttentionTest, EqualsOneRankWithinTheBound) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (const int ranks : {1, 2, 4, 8}) {
    for (const int interleave : {1, 16}) {
      SCOPED_TRACE("N " + std::to_string(ranks) + " I " + std::to_string(interleave));
      DcpProblem p(mixed_shape(GetParam(), ranks, interleave), rng);
      p.run(DcpCombine::all_gather_reduce_scatter);
      ASSERT_NO_FATAL_FAILURE(expect_within_bounds(p));
      const auto out = p.out.snapshot();
      const auto lse = p.lse.snapshot();
      p.run(DcpCombine::all_to_all);
      EXPECT_EQ(p.out.snapshot(), out);
      EXPECT_EQ(p.lse.snapshot(), lse);
    }
  }
}

TEST_P(DcpAttentionTest, RandomShapes) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  for (int round = 0; round < testing::scaled(12, 3); ++round) {
    DcpShape s;
    s.dtype = GetParam();
    s.layout = {static_cast<int>(rng.integer(1, 6)), rng.pick(std::array{1, 2, 4, 8})};
    s.block_size = rng.pick(std::array{8, 16, 32});
    s.heads_a_rank = static_cast<int>(rng.integer(1, 4));
    do {
      s.kv_heads = static_cast<int>(rng.integer(1, 6));
    } while (s.heads() % s.kv_heads != 0);
    s.dim = 8 * static_cast<int>(rng.integer(1, 5));
    s.dim_v = 8 * static_cast<int>(rng.integer(1, 5));
    s.causal = rng.chance(0.7);
    if (rng.chance(0.3)) s.softcap = 5.0F;
    for (auto n = rng.integer(1, 6); n > 0; --n) {
      s.context_lens.push_back(rng.chance(0.3) ? 0 : static_cast<int>(rng.integer(1, 400)));
      s.query_lens.push_back(rng.chance(0.5) ? 1 : static_cast<int>(rng.integer(0, 9)));
    }
    DcpProblem p(s, rng);
    p.run(rng.chance(0.5) ? DcpCombine::all_to_all : DcpCombine::all_gather_reduce_scatter);
    ASSERT_NO_FATAL_FAILURE(expect_within_bounds(p)) << "round " << round;
  }
}

TEST(DcpAttention, HeadsOfARankThatCutThroughAGroup) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  // Groups of 2: rank 0 has heads 0 1 | 2, rank 1 has 3 | 4 5.
  DcpShape s = mixed_shape(DType::bf16, 2, 4);
  s.kv_heads = 3;
  s.heads_a_rank = 3;
  DcpProblem p(s, rng);
  p.run(DcpCombine::all_to_all);
  expect_within_bounds(p);
}

TEST(DcpAttention, CausalityOfEachRequest) {
  Rng rng(4);
  SCOPED_TRACE(rng.trace());
  for (const bool causal : {false, true}) {
    DcpShape s = mixed_shape(DType::f32, 4, 1);
    s.causal = causal;  // overruled by the flags
    s.request_causal = {1, 0, 0, 1, 1, 0, 0, 1, 1, 0};
    DcpProblem p(s, rng);
    p.run(DcpCombine::all_gather_reduce_scatter);
    expect_within_bounds(p);
  }
}

TEST_P(DcpAttentionTest, WithoutContextTheBitsAreThoseOfOneRank) {
  Rng rng(5);
  SCOPED_TRACE(rng.trace());
  DcpProblem p(mixed_shape(GetParam(), 4, 16), rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto one = make_thread_pool(1);
  flash_attn_varlen(p.whole(), one.get());
  const auto row_bytes = [](const TensorView& t, std::int64_t token) {
    const TensorView row = t.select(0, token);
    const auto* data = static_cast<const unsigned char*>(row.data);
    return std::vector<unsigned char>(
        data, data + static_cast<std::size_t>(row.numel()) * size_of(row.dtype));
  };
  int compared = 0;
  for (std::size_t r = 0; r < p.shape.query_lens.size(); ++r) {
    if (p.shape.context_lens[r] > 0) continue;
    for (int i = 0; i < p.shape.query_lens[r]; ++i, ++compared) {
      const std::int64_t t = p.query_start_loc.as<std::int32_t>()[r] + i;
      EXPECT_EQ(row_bytes(p.out, t), row_bytes(p.whole_out, t));
      EXPECT_EQ(row_bytes(p.lse, t), row_bytes(p.whole_lse, t));
    }
  }
  EXPECT_EQ(compared, 5);
}

TEST_P(DcpAttentionTest, ARequestAloneHasTheBitsOfTheBatch) {
  Rng rng(9);
  SCOPED_TRACE(rng.trace());
  DcpProblem p(mixed_shape(GetParam(), 4, 16), rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto out = p.out.snapshot();
  const auto lse = p.lse.snapshot();
  p.out.fill_bytes(0xFF);
  p.lse.fill_bytes(0xFF);
  // Each request's call writes its own rows, so that together they must give the batch's memory.
  for (std::size_t r = 0; r < p.shape.query_lens.size(); ++r) {
    const auto request = static_cast<std::int64_t>(r);
    const std::int64_t first = p.query_start_loc.as<std::int32_t>()[r];
    const std::int64_t count = p.shape.query_lens[r];
    const testing::HostTensor start(DType::i32, {2});
    start.as<std::int32_t>()[1] = p.shape.query_lens[r];
    run_in_process(4, [&](Communicator& c) {
      const auto one = make_thread_pool(1);
      DcpAttentionArgs a = p.args(c.rank());
      a.q = a.q.slice(0, first, count);
      a.k_new = a.k_new.slice(0, first, count);
      a.v_new = a.v_new.slice(0, first, count);
      a.out = a.out.slice(0, first, count);
      a.lse = a.lse.slice(0, first, count);
      a.query_start_loc = start;
      a.seq_lens = a.seq_lens.slice(0, request, 1);
      a.block_table = a.block_table.slice(0, request, 1);
      dcp_attention(a, c, one.get());
    });
  }
  EXPECT_EQ(p.out.snapshot(), out);
  EXPECT_EQ(p.lse.snapshot(), lse);
}

TEST_P(DcpAttentionTest, RerunsAndThreadsGiveTheSameBits) {
  Rng rng(6);
  SCOPED_TRACE(rng.trace());
  DcpProblem p(mixed_shape(GetParam(), 4, 1), rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto out = p.out.snapshot();
  const auto lse = p.lse.snapshot();
  for (int round = 0; round < testing::scaled(5, 2); ++round) {
    p.run(round % 2 == 0 ? DcpCombine::all_to_all : DcpCombine::all_gather_reduce_scatter,
          1 + round % 3);
    EXPECT_EQ(p.out.snapshot(), out);
    EXPECT_EQ(p.lse.snapshot(), lse);
  }
}

TEST(DcpAttention, TheDefaultExecutorServesAllRanksAndTheLseIsOptional) {
  Rng rng(7);
  SCOPED_TRACE(rng.trace());
  DcpProblem p(mixed_shape(DType::f32, 2, 8), rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto out = p.out.snapshot();
  p.out.fill_bytes(0xFF);
  run_in_process(2, [&](Communicator& c) {
    DcpAttentionArgs a = p.args(c.rank());
    a.lse = {};
    dcp_attention(a, c);
  });
  EXPECT_EQ(p.out.snapshot(), out);
}

TEST(DcpAttention, AnEmptyBatch) {
  Rng rng(8);
  DcpShape s = mixed_shape(DType::f32, 2, 1);
  for (const int num_reqs : {0, 2}) {
    s.context_lens.assign(static_cast<std::size_t>(num_reqs), 7);
    s.query_lens.assign(static_cast<std::size_t>(num_reqs), 0);
    DcpProblem p(s, rng);
    EXPECT_NO_THROW(p.run(DcpCombine::all_to_all));
    EXPECT_NO_THROW(p.run(DcpCombine::all_gather_reduce_scatter));
  }
}

}  // namespace
}  // namespace attend
