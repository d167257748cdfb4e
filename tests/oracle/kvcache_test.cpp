// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "attend/oracle/attention.h"

namespace attend::oracle {
namespace {

constexpr std::int64_t kDim = 16;
const float kNan = std::nanf("");

/// One request, one head, a dense cache of 4 rows; value row j holds v[j] everywhere.
struct Problem {
  std::vector<float> q = std::vector<float>(kDim, 0.0F), out = q;
  std::vector<float> k_cache = std::vector<float>(4 * kDim, 0.0F), v_cache = k_cache;
  std::vector<float> k_new = std::vector<float>(kDim, 0.0F), v_new = k_new;
  std::vector<float> cos = std::vector<float>(4 * kDim / 2, kNan), sin = cos;
  std::vector<std::int32_t> seqlens{2}, leftpad{0}, batch_idx{0};
  FlashAttnWithKvCacheArgs args;

  Problem() {
    args.q = {q.data(), DType::f32, {1, 1, 1, kDim}};
    args.k_cache = {k_cache.data(), DType::f32, {1, 4, 1, kDim}};
    args.v_cache = {v_cache.data(), DType::f32, {1, 4, 1, kDim}};
    args.out = {out.data(), DType::f32, {1, 1, 1, kDim}};
    args.cache_seqlens = {seqlens.data(), DType::i32, {1}};
  }
  void set_values(const std::vector<float>& rows) {
    for (std::size_t i = 0; i < rows.size() * kDim; ++i) v_cache[i] = rows[i / kDim];
  }
  void append(float v) {
    v_new.assign(kDim, v);
    args.k_new = {k_new.data(), DType::f32, {1, 1, 1, kDim}};
    args.v_new = {v_new.data(), DType::f32, {1, 1, 1, kDim}};
  }
  /// Rotation by a quarter turn at `position`, none elsewhere is defined.
  void rotate_quarter_at(std::int64_t position, bool interleaved) {
    for (std::int64_t i = 0; i < kDim / 2; ++i) {
      cos[static_cast<std::size_t>(position * kDim / 2 + i)] = 0.0F;
      sin[static_cast<std::size_t>(position * kDim / 2 + i)] = 1.0F;
    }
    args.rotary_cos = {cos.data(), DType::f32, {4, kDim / 2}};
    args.rotary_sin = {sin.data(), DType::f32, {4, kDim / 2}};
    args.rotary_interleaved = interleaved;
  }
};

TEST(OracleKvCache, ReadsAsManyRowsAsTheLengthSays) {
  Problem p;
  p.set_values({1, 5, kNan, kNan});
  EXPECT_DOUBLE_EQ(oracle::flash_attn_with_kvcache(p.args).out[0], 3.0);
  p.set_values({1, 2, 3, 6});
  p.args.cache_seqlens = {};
  EXPECT_DOUBLE_EQ(oracle::flash_attn_with_kvcache(p.args).out[0], 3.0);
}

TEST(OracleKvCache, AppendsAfterTheValidRows) {
  Problem p;
  p.set_values({1, 5, kNan, kNan});
  p.append(9);
  const Result r = oracle::flash_attn_with_kvcache(p.args);
  EXPECT_DOUBLE_EQ(r.out[0], 5.0);
  EXPECT_DOUBLE_EQ(r.lse[0], std::log(3.0));
}

TEST(OracleKvCache, LeftPaddingHidesRowsAndShiftsPositions) {
  Problem p;
  p.set_values({kNan, 5, kNan, kNan});
  p.leftpad = {1};
  p.args.cache_leftpad = {p.leftpad.data(), DType::i32, {1}};
  p.append(7);
  EXPECT_DOUBLE_EQ(oracle::flash_attn_with_kvcache(p.args).out[0], 6.0);
  const float slope = 1.0F;
  p.args.params.alibi_slopes = {&slope, DType::f32, {1}};
  EXPECT_DOUBLE_EQ(oracle::flash_attn_with_kvcache(p.args).lse[0], std::log(1.0 + std::exp(-1.0)));
}

TEST(OracleKvCache, BatchIndexChoosesTheRow) {
  Problem p;
  p.v_cache.assign(2 * 4 * kDim, kNan);
  p.k_cache.assign(2 * 4 * kDim, 0.0F);
  for (std::size_t i = 4 * kDim; i < 6 * kDim; ++i) p.v_cache[i] = 4.0F;
  p.args.k_cache = {p.k_cache.data(), DType::f32, {2, 4, 1, kDim}};
  p.args.v_cache = {p.v_cache.data(), DType::f32, {2, 4, 1, kDim}};
  p.batch_idx = {1};
  p.args.cache_batch_idx = {p.batch_idx.data(), DType::i32, {1}};
  EXPECT_DOUBLE_EQ(oracle::flash_attn_with_kvcache(p.args).out[0], 4.0);
}

TEST(OracleKvCache, RotatesNewKeysAtTheirPosition) {
  for (const bool interleaved : {true, false}) {
    Problem p;
    p.append(1);
    p.k_new[0] = 3.0F;
    p.rotate_quarter_at(2, interleaved);
    const AppendedKeys keys = appended_keys(p.args);
    // (3, 0) turns into (0, 3): the partner is the next element or the one half a row away.
    const std::size_t partner = interleaved ? 1 : kDim / 2;
    for (std::size_t d = 0; d < kDim; ++d) {
      EXPECT_DOUBLE_EQ(keys.value[d], d == partner ? 3.0 : 0.0) << d;
    }
  }
}

TEST(OracleKvCache, RotationOfQueryAndKeyByTheSameAngleKeepsTheLogit) {
  Problem p;
  p.set_values({0, 0, 0, 0});
  p.append(1);
  p.q[0] = 2.0F;
  p.k_new[0] = 3.0F;
  p.args.params.scale = 1.0F;
  p.rotate_quarter_at(2, true);
  const Result r = oracle::flash_attn_with_kvcache(p.args);
  EXPECT_DOUBLE_EQ(r.lse[0], std::log(2.0 + std::exp(6.0)));
}

TEST(OracleKvCache, LseIsLaidOutByHead) {
  Problem p;
  p.q.assign(2 * 2 * kDim, 0.0F);
  p.out = p.q;
  p.args.q = {p.q.data(), DType::f32, {1, 2, 2, kDim}};
  p.args.out = {p.out.data(), DType::f32, {1, 2, 2, kDim}};
  p.args.params.causal = true;
  const Result r = oracle::flash_attn_with_kvcache(p.args);
  EXPECT_EQ(r.lse[0], 0.0);  // head 0: query 0 sees one key, query 1 sees two
  EXPECT_DOUBLE_EQ(r.lse[1], std::log(2.0));
  EXPECT_EQ(r.lse[2], 0.0);
  EXPECT_DOUBLE_EQ(r.lse[3], std::log(2.0));
}

}  // namespace
}  // namespace attend::oracle
