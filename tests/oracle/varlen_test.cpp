// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attend/oracle/attention.h"

namespace attend::oracle {
namespace {

constexpr std::int64_t kDim = 8;
const float kNan = std::nanf("");

ConstTensorView ints(const std::vector<std::int32_t>& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}

/// Rows whose elements all hold the row's number.
std::vector<float> rows_of(std::initializer_list<float> values) {
  std::vector<float> rows;
  for (const float x : values) rows.insert(rows.end(), kDim, x);
  return rows;
}

TEST(OracleVarlen, AlignsQueriesToTheEndOfTheKeys) {
  // Request 0: 1 query, 3 keys. Request 1: no query. Request 2: 3 queries, 2 keys.
  const std::vector<std::int32_t> q_start{0, 1, 1, 4}, k_start{0, 3, 4, 6};
  const std::vector<float> q(4 * kDim, 0.0F);
  const std::vector<float> v = rows_of({1, 2, 6, 99, 10, 20});
  std::vector<float> out(4 * kDim);
  FlashAttnVarlenArgs a;
  a.q = {q.data(), DType::f32, {4, 1, kDim}};
  a.k = {v.data(), DType::f32, {6, 1, kDim}};
  a.v = a.k;
  a.out = {out.data(), DType::f32, {4, 1, kDim}};
  a.query_start_loc = ints(q_start);
  a.cu_seqlens_kv = ints(k_start);
  a.params.causal = true;
  const Result r = oracle::flash_attn_varlen(a);
  EXPECT_DOUBLE_EQ(r.out[0], 3.0);
  EXPECT_EQ(r.out[1 * kDim], 0.0);  // position -1
  EXPECT_EQ(r.lse[1], -std::numeric_limits<double>::infinity());
  EXPECT_DOUBLE_EQ(r.out[2 * kDim], 10.0);
  EXPECT_DOUBLE_EQ(r.out[3 * kDim], 15.0);
  EXPECT_DOUBLE_EQ(r.lse[3], std::log(2.0));
}

TEST(OracleVarlen, ReadsPagesThroughTheBlockTable) {
  // Blocks of 2 tokens, HND: [block, head, token, dim]. Keys 0, 1 in block 2 and key 2 in block 0.
  std::vector<float> cache(3 * 2 * 2 * kDim, kNan);
  const auto put = [&](std::int64_t block, std::int64_t head, std::int64_t token, float x) {
    for (std::int64_t d = 0; d < kDim; ++d) {
      cache[static_cast<std::size_t>(((block * 2 + head) * 2 + token) * kDim + d)] = x;
    }
  };
  put(2, 0, 0, 1), put(2, 0, 1, 2), put(0, 0, 0, 3);
  put(2, 1, 0, 10), put(2, 1, 1, 20), put(0, 1, 0, 60);
  const std::vector<std::int32_t> q_start{0, 1}, seq_lens{3}, table{2, 0, 0x7fffffff};
  const std::vector<float> q(4 * kDim, 0.0F);
  std::vector<float> out(4 * kDim);
  FlashAttnVarlenArgs a;
  a.q = {q.data(), DType::f32, {1, 4, kDim}};
  a.k = ConstTensorView{cache.data(), DType::f32, {3, 2, 2, kDim}}.permute({0, 2, 1, 3});
  a.v = a.k;
  a.out = {out.data(), DType::f32, {1, 4, kDim}};
  a.query_start_loc = ints(q_start);
  a.seq_lens = ints(seq_lens);
  a.block_table = {table.data(), DType::i32, {1, 3}};
  const Result r = oracle::flash_attn_varlen(a);
  for (int head = 0; head < 4; ++head) {  // query heads 0, 1 read kv head 0; 2, 3 read kv head 1
    EXPECT_DOUBLE_EQ(r.out[static_cast<std::size_t>(head * kDim)], head < 2 ? 2.0 : 30.0);
  }
}

TEST(OracleVarlen, SlopesBelongToHeadOrRequestAndHead) {
  const std::vector<std::int32_t> q_start{0, 1, 2}, k_start{0, 2, 4};
  const std::vector<float> q(2 * 2 * kDim, 0.0F), kv(4 * kDim, 1.0F);
  const std::vector<float> slopes{1.0F, 2.0F, 3.0F, 4.0F};
  std::vector<float> out(2 * 2 * kDim);
  FlashAttnVarlenArgs a;
  a.q = {q.data(), DType::f32, {2, 2, kDim}};
  a.k = {kv.data(), DType::f32, {4, 1, kDim}};
  a.v = a.k;
  a.out = {out.data(), DType::f32, {2, 2, kDim}};
  a.query_start_loc = ints(q_start);
  a.cu_seqlens_kv = ints(k_start);
  const auto expect_slopes = [&](std::vector<double> expected) {
    const Result r = oracle::flash_attn_varlen(a);
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_DOUBLE_EQ(r.lse[i], std::log(1.0 + std::exp(-expected[i])));
    }
  };
  a.params.alibi_slopes = {slopes.data(), DType::f32, {2}};
  expect_slopes({1, 2, 1, 2});
  a.params.alibi_slopes = {slopes.data(), DType::f32, {2, 2}};
  expect_slopes({1, 2, 3, 4});
}

TEST(OracleVarlen, DecodesHalfAndBfloat) {
  const std::vector<std::int32_t> start{0, 1};
  // 1.5, -2, smallest subnormal, largest finite, 0, -0, 1 + 2^-10, 0.333251953125
  const std::vector<std::uint16_t> f16{0x3e00, 0xc000, 0x0001, 0x7bff, 0, 0x8000, 0x3c01, 0x3555};
  const std::vector<double> f16_values{1.5, -2, 0x1p-24, 65504, 0, 0, 1 + 0x1p-10, 0.333251953125};
  const std::vector<std::uint16_t> bf16{0x3fc0, 0xc000, 0x0001, 0x7f7f, 0, 0x8000, 0x3f81, 0x3eab};
  const std::vector<double> bf16_values{1.5, -2, 0x1p-133,   0x1.fep127,
                                        0,   0,  1 + 0x1p-7, 0.333984375};
  std::vector<std::uint16_t> zero(kDim, 0), out(kDim);
  FlashAttnVarlenArgs a;
  a.query_start_loc = ints(start);
  a.cu_seqlens_kv = ints(start);
  for (const DType t : {DType::f16, DType::bf16}) {
    const auto& values = t == DType::f16 ? f16_values : bf16_values;
    a.q = {zero.data(), t, {1, 1, kDim}};
    a.k = a.q;
    a.v = {t == DType::f16 ? f16.data() : bf16.data(), t, {1, 1, kDim}};
    a.out = {out.data(), t, {1, 1, kDim}};
    const Result r = oracle::flash_attn_varlen(a);
    for (std::size_t d = 0; d < kDim; ++d) EXPECT_EQ(r.out[d], values[d]);
  }
}

TEST(OracleVarlen, DefaultScaleIsTheRootOfTheHeadDim) {
  const std::vector<std::int32_t> start{0, 1};
  const std::vector<float> ones(kDim, 1.0F);
  std::vector<float> out(kDim);
  FlashAttnVarlenArgs a;
  a.q = {ones.data(), DType::f32, {1, 1, kDim}};
  a.k = a.q;
  a.v = a.q;
  a.out = {out.data(), DType::f32, {1, 1, kDim}};
  a.query_start_loc = ints(start);
  a.cu_seqlens_kv = ints(start);
  EXPECT_DOUBLE_EQ(oracle::flash_attn_varlen(a).lse[0], std::sqrt(8.0));
  a.params.scale = 0.25F;
  EXPECT_DOUBLE_EQ(oracle::flash_attn_varlen(a).lse[0], 2.0);
}

}  // namespace
}  // namespace attend::oracle
