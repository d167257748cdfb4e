// SPDX-License-Identifier: Apache-2.0
// Rows of sparse_mla_attention are those of mla_decode over the named rows, whatever else is there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/float_types.h"
#include "backend/allocation_counter.h"
#include "sparse_batch.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Types {
  DType dtype, cache;
};
const Types kTypes[] = {{DType::bf16, DType::bf16},    {DType::f16, DType::f16},
                        {DType::f32, DType::f32},      {DType::bf16, DType::fp8_e4m3},
                        {DType::f16, DType::fp8_e5m2}, {DType::bf16, DType::u8}};

LatentOptions options_of(const Types& t, int heads) {
  LatentOptions o;
  o.dtype = t.dtype;
  o.cache = t.cache;
  o.heads = heads;
  o.causal = false;
  return o;
}

class SparseMla : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(SparseMla, IsDenseDecodeOverTheNamedRowsInTheirOrder) {
  for (const Types& types : kTypes) {
    for (const int heads : {1, 16, 20}) {
      for (const int block_size : {1, 16, 64}) {
        if (block_size != 16 && scaled(1, 0) == 0) continue;
        LatentOptions o = options_of(types, heads);
        o.block_size = block_size;
        o.placement = 5;
        LatentBatch dense(o, {{0, 700, 1}, {1, 1, 1}, {2, 256, 1}, {3, 0, 1}, {4, 257, 1}});
        const LatentBatch::Rows wanted = dense.run(nullptr, GetParam());
        SparseBatch sparse(dense, 1300);
        EXPECT_EQ(sparse.run(nullptr, GetParam()), wanted)
            << to_string(types.dtype) << " " << to_string(types.cache) << " heads " << heads;
      }
    }
  }
}

TEST_P(SparseMla, BitsDoNotDependOnWidthWorkersNeighboursOrLengths) {
  for (const Types& types : kTypes) {
    const LatentOptions o = options_of(types, 12);
    LatentBatch crowd(o, {{0, 520, 1}, {1, 37, 1}, {2, 256, 1}});
    const LatentBatch::Rows wanted = SparseBatch(crowd, 520).run(nullptr, GetParam());
    for (const int workers : {1, 2, 5}) {
      const auto pool = make_thread_pool(workers);
      for (const int topk : {520, 521, 2048, 9000})
        EXPECT_EQ(SparseBatch(crowd, topk).run(pool.get(), GetParam()), wanted) << topk;
      LatentBatch alone(o, {{1, 37, 1}});
      EXPECT_EQ(SparseBatch(alone, 64).run(pool.get(), GetParam()).at({1, 36}), wanted.at({1, 36}));
      SparseBatch with_lengths(crowd, 2048);
      with_lengths.hide_behind_lengths();
      EXPECT_EQ(with_lengths.run(pool.get(), GetParam()), wanted);
    }
  }
}

TEST_P(SparseMla, APlanServesAnyNumberOfKeysWithoutAllocation) {
  LatentBatch crowd(options_of({DType::bf16, DType::u8}, 16), {{0, 900, 1}, {1, 0, 1}, {2, 3, 1}});
  SparseBatch sparse(crowd, 2048);
  const LatentBatch::Rows wanted = crowd.run(nullptr, GetParam());
  const auto pool = make_thread_pool(3);
  const SparseMlaPlan plan = plan_sparse_mla({.num_tokens = 3,
                                              .topk = 2048,
                                              .num_heads = 16,
                                              .head_dim_qk = 576,
                                              .head_dim_v = 512,
                                              .num_workers = 3,
                                              .isa = GetParam()});
  Buffer memory(plan.workspace_bytes);
  for (int i = 0; i < 2; ++i) {
    std::fill_n(static_cast<unsigned char*>(memory.data()), memory.size(), 0xff);
    crowd.out.fill_bytes(0xff);
    const std::size_t before = num_allocations();
    sparse_mla_attention(sparse.args(), plan, memory.workspace(), *pool);
    EXPECT_EQ(num_allocations(), before);
    EXPECT_EQ(crowd.rows(), wanted);
  }
}

TEST_P(SparseMla, RowsWithoutAKeyAreZeroAndMinusInfinity) {
  for (const Types& types : kTypes) {
    LatentBatch batch(options_of(types, 3), {{0, 30, 1}, {1, 40, 1}});
    SparseBatch sparse(batch, 300);
    for (std::int32_t& slot : sparse.indices.as<std::int32_t>()) slot = -1;
    sparse.run(nullptr, GetParam());
    for (std::int64_t t = 0; t < 2; ++t) {
      for (std::int64_t h = 0; h < 3; ++h) {
        EXPECT_EQ(get(batch.lse, {t, h}), -kInf);
        EXPECT_EQ(get(sparse.max_logits, {t, h}), -kInf);
        for (std::int64_t d = 0; d < 512; ++d) ASSERT_EQ(get(batch.out, {t, h, d}), 0.0);
      }
    }
  }
}

TEST_P(SparseMla, ARowNamedTwiceCountsTwice) {
  LatentBatch batch(options_of({DType::f32, DType::f32}, 4), {{0, 1, 1}, {1, 50, 1}});
  SparseBatch once(batch, 50), twice(batch, 100);
  once.run(nullptr, GetParam());
  std::vector<double> lse, out;
  for (std::int64_t t = 0; t < 2; ++t) {
    for (std::int64_t h = 0; h < 4; ++h) {
      lse.push_back(get(batch.lse, {t, h}));
      out.push_back(get(batch.out, {t, h, 7}));
    }
  }
  const auto from = once.indices.as<std::int32_t>();
  const auto to = twice.indices.as<std::int32_t>();
  for (std::size_t i = 0; i < 100; ++i) to[i] = from[i / 2], to[100 + i] = from[50 + i % 50];
  twice.run(nullptr, GetParam());
  for (std::int64_t t = 0; t < 2; ++t) {
    for (std::int64_t h = 0; h < 4; ++h) {
      const auto i = static_cast<std::size_t>(t * 4 + h);
      EXPECT_NEAR(get(batch.lse, {t, h}), lse[i] + std::log(2.0), 1e-4);
      EXPECT_NEAR(get(batch.out, {t, h, 7}), out[i], 1e-4);
      EXPECT_EQ(get(twice.max_logits, {t, h}), get(once.max_logits, {t, h}));
    }
  }
}

TEST_P(SparseMla, AnotherOrderIsWithinRoundingAndHasTheSameLargestLogit) {
  LatentBatch batch(options_of({DType::f32, DType::f32}, 4), {{0, 700, 1}});
  SparseBatch sparse(batch, 700);
  sparse.run(nullptr, GetParam());
  const double lse = get(batch.lse, {0, 2}), out = get(batch.out, {0, 2, 9});
  const float largest = sparse.max_logits.as<float>()[2];
  const auto indices = sparse.indices.as<std::int32_t>();
  std::reverse(indices.begin(), indices.end());
  sparse.run(nullptr, GetParam());
  EXPECT_NEAR(get(batch.lse, {0, 2}), lse, 1e-4);
  EXPECT_NEAR(get(batch.out, {0, 2, 9}), out, 1e-4);
  EXPECT_EQ(sparse.max_logits.as<float>()[2], largest);
}

TEST_P(SparseMla, BlocksMayLieAtAnyDistance) {
  LatentOptions o = options_of({DType::bf16, DType::bf16}, 4);
  o.block_size = 4;
  LatentBatch batch(o, {{0, 300, 1}, {1, 20, 1}});
  SparseBatch sparse(batch, 320);
  const LatentBatch::Rows wanted = sparse.run(nullptr, GetParam());
  const std::int64_t blocks = batch.cache.view().shape[0];
  // Rows of 580 elements, and 100 behind each block: neither divides the other.
  HostTensor memory(DType::bf16, {blocks * (4 * 580 + 100)});
  memory.fill_bytes(0xff);
  TensorView apart = batch.cache;
  apart.data = memory.view().data;
  apart.strides[0] = 4 * 580 + 100;
  apart.strides[1] = 580;
  for (std::int64_t b = 0; b < blocks; ++b)
    for (std::int64_t i = 0; i < 4; ++i)
      std::memcpy(apart.select(0, b).select(0, i).data,
                  batch.cache.view().select(0, b).select(0, i).data, 1152);
  SparseMlaArgs a = sparse.args();
  a.kv_cache = apart;
  batch.out.fill_bytes(0xff);
  sparse_mla_attention(a, nullptr, GetParam());
  EXPECT_EQ(batch.rows(), wanted);
}

INSTANTIATE_TEST_SUITE_P(Levels, SparseMla, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

}  // namespace
}  // namespace attend::testing
