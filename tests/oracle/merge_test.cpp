// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "attend/oracle/attention.h"

namespace attend::oracle {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::nanf("");

/// Merge of one element per token.
struct Tokens {
  std::array<float, 2> prefix_out{}, prefix_lse{}, suffix_out{}, suffix_lse{}, out{};

  Result merge(int with_prefix = -1) {
    MergeAttnStatesArgs a;
    a.prefix_out = {prefix_out.data(), DType::f32, {2, 1, 1}};
    a.prefix_lse = {prefix_lse.data(), DType::f32, {2, 1}};
    a.suffix_out = {suffix_out.data(), DType::f32, {2, 1, 1}};
    a.suffix_lse = {suffix_lse.data(), DType::f32, {2, 1}};
    a.out = {out.data(), DType::f32, {2, 1, 1}};
    a.prefill_tokens_with_context = with_prefix;
    return oracle::merge_attn_states(a);
  }
};

TEST(OracleMerge, WeighsByTheExponentOfTheLse) {
  Tokens t{{1.0F, 8.0F}, {std::log(3.0F), 0.0F}, {5.0F, 4.0F}, {0.0F, 0.0F}, {}};
  const Result r = t.merge();
  EXPECT_NEAR(r.out[0], 2.0, 1e-6);
  EXPECT_NEAR(r.lse[0], std::log(4.0), 1e-6);
  EXPECT_DOUBLE_EQ(r.out[1], 6.0);
  EXPECT_DOUBLE_EQ(r.lse[1], std::log(2.0));
}

TEST(OracleMerge, EmptySidesAreNotRead) {
  for (const float empty : {kInf, -kInf, kNan}) {
    Tokens t{{kNan, 2.0F}, {empty, 1.0F}, {3.0F, kNan}, {-5.0F, empty}, {}};
    const Result r = t.merge();
    EXPECT_EQ(r.out[0], 3.0);
    EXPECT_EQ(r.lse[0], -5.0);
    EXPECT_EQ(r.out[1], 2.0);
    EXPECT_EQ(r.lse[1], 1.0);
  }
}

TEST(OracleMerge, TwoEmptySidesGiveTheEmptyResult) {
  Tokens t{{kNan, kNan}, {kInf, kNan}, {kNan, kNan}, {-kInf, kInf}, {}};
  const Result r = t.merge();
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(r.out[static_cast<std::size_t>(i)], 0.0);
    EXPECT_EQ(r.lse[static_cast<std::size_t>(i)], -kInf);
  }
}

TEST(OracleMerge, TokensWithoutContextTakeTheSuffix) {
  Tokens t{{2.0F, kNan}, {0.0F, 0.0F}, {4.0F, 9.0F}, {0.0F, 7.0F}, {}};
  const Result r = t.merge(1);
  EXPECT_EQ(r.out[0], 3.0);
  EXPECT_EQ(r.out[1], 9.0);
  EXPECT_EQ(r.lse[1], 7.0);
  EXPECT_GT(r.out_bound[0], 0.0);
  EXPECT_EQ(r.out_bound[1], 0.0);
}

}  // namespace
}  // namespace attend::oracle
