// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>

#include "dist/dcp_mla_problem.h"
#include "support/scale.h"

namespace attend {
namespace {

using testing::expect_within;
using testing::MlaBatch;
using testing::MlaBatchShape;
using testing::MlaRanks;
using testing::Rng;

struct Format {
  const char* name;
  DType dtype, kv_dtype;
};

/// Decodes and short extends, requests with fewer tokens than there are ranks among them.
MlaBatchShape mixed_shape(const Format& format) {
  MlaBatchShape s;
  s.dtype = format.dtype;
  s.kv_dtype = format.kv_dtype;
  if (s.kv_dtype == DType::u8) {
    s.latent = 512;
    s.rope = 64;
  }
  s.seq_lens = {1, 2, 3, 17, 18, 40, 130, 299, 600, 64, 5};
  s.query_lens = {1, 1, 3, 2, 1, 1, 1, 5, 1, 4, 0};
  return s;
}

class DcpMlaDecodeTest : public ::testing::TestWithParam<Format> {};
INSTANTIATE_TEST_SUITE_P(Formats, DcpMlaDecodeTest,
                         ::testing::Values(Format{"f32", DType::f32, DType::f32},
                                           Format{"f16", DType::f16, DType::f16},
                                           Format{"bf16", DType::bf16, DType::bf16},
                                           Format{"fp8_e4m3", DType::bf16, DType::fp8_e4m3},
                                           Format{"fp8_e5m2", DType::f32, DType::fp8_e5m2},
                                           Format{"fp8_ds_mla", DType::bf16, DType::u8}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(DcpMlaDecodeTest, EqualsOneRankWithinTheBoundForBothWaysOfCombining) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  const MlaBatch batch(mixed_shape(GetParam()), rng);
  const MlaRanks whole(batch, {1, 1}, 16, rng);
  for (const int ranks : {1, 2, 3, 4}) {
    const oracle::Result want = testing::expected(whole, ranks);
    for (const int interleave : {1, 2, 16}) {
      SCOPED_TRACE("N " + std::to_string(ranks) + " I " + std::to_string(interleave));
      MlaRanks p(batch, {ranks, interleave}, 16, rng);
      p.run(DcpCombine::all_gather_reduce_scatter);
      ASSERT_NO_FATAL_FAILURE(expect_within(p, want));
      const auto out = p.out.snapshot();
      const auto lse = p.lse.snapshot();
      p.run(DcpCombine::all_to_all);
      EXPECT_EQ(p.out.snapshot(), out);
      EXPECT_EQ(p.lse.snapshot(), lse);
    }
  }
}

TEST_P(DcpMlaDecodeTest, OneRankHasTheBitsOfMlaDecode) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  for (const bool causal : {true, false}) {
    MlaBatchShape s = mixed_shape(GetParam());
    s.causal = causal;
    const MlaBatch batch(s, rng);
    MlaRanks p(batch, {1, 4}, 16, rng);
    const auto one = make_thread_pool(1);
    mla_decode(p.whole(), one.get());
    const auto out = p.out.snapshot();
    const auto lse = p.lse.snapshot();
    for (const auto combine : {DcpCombine::all_gather_reduce_scatter, DcpCombine::all_to_all}) {
      p.run(combine);
      EXPECT_EQ(p.out.snapshot(), out);
      EXPECT_EQ(p.lse.snapshot(), lse);
    }
  }
}

TEST(DcpMlaDecode, RandomShapes) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  for (int round = 0; round < testing::scaled(20, 4); ++round) {
    MlaBatchShape s;
    s.dtype = rng.pick(std::array{DType::f32, DType::f16, DType::bf16});
    s.kv_dtype = rng.pick(std::array{s.dtype, s.dtype, DType::fp8_e4m3});
    const DcpLayout layout{static_cast<int>(rng.integer(1, 6)), rng.pick(std::array{1, 2, 4, 8})};
    s.heads = layout.world_size * static_cast<int>(rng.integer(1, 9));
    s.latent = 8 * static_cast<int>(rng.integer(1, 5));
    s.rope = 8 * static_cast<int>(rng.integer(1, 3));
    s.causal = rng.chance(0.7);
    if (rng.chance(0.3)) s.softcap = 5.0F;
    for (auto n = rng.integer(1, 6); n > 0; --n) {
      s.query_lens.push_back(rng.chance(0.5) ? 1 : static_cast<int>(rng.integer(0, 20)));
      const auto context = rng.chance(0.3) ? 0 : rng.integer(1, 400);
      s.seq_lens.push_back(s.query_lens.back() + static_cast<int>(context));
    }
    const MlaBatch batch(s, rng);
    const MlaRanks whole(batch, {1, 1}, 16, rng);
    MlaRanks p(batch, layout, rng.pick(std::array{8, 16, 32}), rng);
    p.run(rng.chance(0.5) ? DcpCombine::all_to_all : DcpCombine::all_gather_reduce_scatter, 2);
    ASSERT_NO_FATAL_FAILURE(expect_within(p, testing::expected(whole, layout.world_size)))
        << "round " << round;
  }
}

TEST_P(DcpMlaDecodeTest, ATokenAloneHasTheBitsOfTheBatch) {
  Rng rng(4);
  SCOPED_TRACE(rng.trace());
  const MlaBatch batch(mixed_shape(GetParam()), rng);
  MlaRanks p(batch, {4, 2}, 16, rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto out = p.out.snapshot();
  const auto lse = p.lse.snapshot();
  p.out.fill_bytes(0xFF);
  p.lse.fill_bytes(0xFF);
  const testing::HostTensor start(DType::i32, {2}), length(DType::i32, {1});
  start.as<std::int32_t>()[1] = 1;
  for (std::size_t r = 0; r < batch.shape.query_lens.size(); ++r) {
    for (int i = 0; i < batch.shape.query_lens[r]; ++i) {
      // As if the later tokens were not there yet.
      length.as<std::int32_t>()[0] = batch.shape.seq_lens[r] - batch.shape.query_lens[r] + i + 1;
      const std::int64_t t = batch.query_start_loc.as<std::int32_t>()[r] + i;
      run_in_process(4, [&](Communicator& c) {
        const auto one = make_thread_pool(1);
        DcpMlaDecodeArgs a = p.args(c.rank());
        a.q = a.q.slice(0, t, 1);
        a.out = a.out.slice(0, t, 1);
        a.lse = a.lse.slice(0, t, 1);
        a.query_start_loc = start;
        a.seq_lens = length;
        a.block_table = a.block_table.slice(0, static_cast<std::int64_t>(r), 1);
        dcp_mla_decode(a, c, one.get());
      });
    }
  }
  EXPECT_EQ(p.out.snapshot(), out);
  EXPECT_EQ(p.lse.snapshot(), lse);
}

TEST(DcpMlaDecode, RerunsAndThreadsGiveTheSameBits) {
  Rng rng(5);
  SCOPED_TRACE(rng.trace());
  const MlaBatch batch(mixed_shape({"", DType::bf16, DType::bf16}), rng);
  MlaRanks p(batch, {3, 1}, 16, rng);
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

TEST(DcpMlaDecode, RanksWithoutAKeyAddNothing) {
  Rng rng(6);
  SCOPED_TRACE(rng.trace());
  // A single token: rank 0 has it, the other ranks' parts are empty and all their slots NaN.
  MlaBatchShape s = mixed_shape({"", DType::bf16, DType::bf16});
  s.seq_lens = s.query_lens = {1, 1};
  const MlaBatch batch(s, rng);
  const MlaRanks whole(batch, {1, 1}, 16, rng);
  MlaRanks p(batch, {4, 16}, 16, rng);
  p.run(DcpCombine::all_to_all);
  mla_decode(whole.whole());
  EXPECT_EQ(p.out.snapshot(), whole.out.snapshot());
  EXPECT_EQ(p.lse.snapshot(), whole.lse.snapshot());
}

TEST(DcpMlaDecode, TheDefaultExecutorServesAllRanksAndTheLseIsOptional) {
  Rng rng(7);
  SCOPED_TRACE(rng.trace());
  const MlaBatch batch(mixed_shape({"", DType::f32, DType::f32}), rng);
  MlaRanks p(batch, {2, 8}, 16, rng);
  p.run(DcpCombine::all_gather_reduce_scatter);
  const auto out = p.out.snapshot();
  p.out.fill_bytes(0xFF);
  run_in_process(2, [&](Communicator& c) {
    DcpMlaDecodeArgs a = p.args(c.rank());
    a.lse = {};
    dcp_mla_decode(a, c);
  });
  EXPECT_EQ(p.out.snapshot(), out);
}

TEST(DcpMlaDecode, AnEmptyBatch) {
  Rng rng(8);
  MlaBatchShape s = mixed_shape({"", DType::f32, DType::f32});
  for (const std::size_t requests : {0U, 2U}) {
    s.seq_lens.assign(requests, 7);
    s.query_lens.assign(requests, 0);
    const MlaBatch batch(s, rng);
    MlaRanks p(batch, {2, 1}, 16, rng);
    EXPECT_NO_THROW(p.run(DcpCombine::all_to_all));
    EXPECT_NO_THROW(p.run(DcpCombine::all_gather_reduce_scatter));
  }
}

}  // namespace
}  // namespace attend
