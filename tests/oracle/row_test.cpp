// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "attend/oracle/attention.h"

namespace attend::oracle {
namespace {

/// One-dimensional problem: logits are q * k_j, values are v_j.
RowProblem scalar_problem(double q, std::vector<double> k, std::vector<double> v) {
  RowProblem p;
  p.head_dim_qk = 1;
  p.head_dim_v = 1;
  p.num_keys = static_cast<std::int64_t>(k.size());
  p.position = p.num_keys - 1;
  p.q = [q](int) { return q; };
  p.k = [k](std::int64_t j, int) { return k.at(static_cast<std::size_t>(j)); };
  p.v = [v](std::int64_t j, int) { return v.at(static_cast<std::size_t>(j)); };
  return p;
}

TEST(OracleRow, EqualLogitsGiveTheMean) {
  const RowResult r = attention_row(scalar_problem(0.0, {5, 6, 7, 8}, {1, 2, 3, 6}));
  EXPECT_DOUBLE_EQ(r.out[0], 3.0);
  EXPECT_DOUBLE_EQ(r.lse, std::log(4.0));
  EXPECT_EQ(r.visible_keys, 4);
}

TEST(OracleRow, OneKeyGivesItsValueAndLogit) {
  RowProblem p = scalar_problem(3.0, {-2.0}, {7.0});
  p.scale = 0.5;
  const RowResult r = attention_row(p);
  EXPECT_DOUBLE_EQ(r.out[0], 7.0);
  EXPECT_DOUBLE_EQ(r.lse, -3.0);
  EXPECT_DOUBLE_EQ(r.logit_magnitude, 3.0);
}

TEST(OracleRow, TwoKeysByHand) {
  // Weights 3/4 and 1/4.
  const RowResult r = attention_row(scalar_problem(1.0, {std::log(3.0), 0.0}, {8.0, -4.0}));
  EXPECT_DOUBLE_EQ(r.out[0], 5.0);
  EXPECT_DOUBLE_EQ(r.abs_out[0], 7.0);
  EXPECT_DOUBLE_EQ(r.lse, std::log(4.0));
}

TEST(OracleRow, SoftcapComesAfterTheScale) {
  RowProblem p = scalar_problem(1.0, {8.0, 0.0}, {1.0, 0.0});
  p.scale = 0.5;
  p.softcap = 2.0;
  const double capped = 2.0 * std::tanh(2.0);
  const RowResult r = attention_row(p);
  EXPECT_DOUBLE_EQ(r.out[0], std::exp(capped) / (std::exp(capped) + 1.0));
  EXPECT_DOUBLE_EQ(r.lse, std::log(std::exp(capped) + 1.0));
}

TEST(OracleRow, AlibiIsTheDistanceTimesTheSlope) {
  RowProblem p = scalar_problem(0.0, {0, 0, 0}, {1, 0, 0});
  p.alibi_slope = 0.5;
  const double sum = std::exp(-1.0) + std::exp(-0.5) + 1.0;
  RowResult r = attention_row(p);
  EXPECT_DOUBLE_EQ(r.out[0], std::exp(-1.0) / sum);
  EXPECT_DOUBLE_EQ(r.lse, std::log(sum));

  // Without the causal mask the distance counts on both sides, and the LSE follows.
  p.causal = false;
  p.position = 1;
  r = attention_row(p);
  EXPECT_DOUBLE_EQ(r.lse, std::log(2 * std::exp(-0.5) + 1.0));
}

TEST(OracleRow, SquareRootAlibiCountsEarlierKeysOnly) {
  RowProblem p = scalar_problem(0.0, {0, 0, 0, 0, 0, 0}, {1, 0, 0, 0, 0, 0});
  p.alibi_slope = 0.5;
  p.alibi_sqrt = true;
  p.causal = false;
  p.position = 4;
  const double sum = std::exp(-1.0) + std::exp(-0.5 * std::sqrt(3.0)) +
                     std::exp(-0.5 * std::sqrt(2.0)) + std::exp(-0.5) + 2.0;
  const RowResult r = attention_row(p);
  EXPECT_DOUBLE_EQ(r.out[0], std::exp(-1.0) / sum);
  EXPECT_DOUBLE_EQ(r.lse, std::log(sum));
}

TEST(OracleRow, ASinkTakesWeightAndGivesNothing) {
  RowProblem p = scalar_problem(1.0, {0.0, 1.0}, {1.0, 0.0});
  p.sink = 2.0;
  const double keys = 1.0 + std::exp(1.0), all = keys + std::exp(2.0);
  RowResult r = attention_row(p);
  EXPECT_DOUBLE_EQ(r.out[0], 1.0 / all);
  EXPECT_DOUBLE_EQ(r.lse, std::log(keys));
  p.lse_includes_sink = true;
  EXPECT_DOUBLE_EQ(attention_row(p).lse, std::log(all));
  // Far above every logit, where a common maximum would lose the keys.
  p.sink = 2000.0;
  p.lse_includes_sink = false;
  r = attention_row(p);
  EXPECT_EQ(r.out[0], 0.0);
  EXPECT_DOUBLE_EQ(r.lse, std::log(keys));
  p.num_keys = 0;
  EXPECT_EQ(attention_row(p).lse, -std::numeric_limits<double>::infinity());
  p.lse_includes_sink = true;
  EXPECT_EQ(attention_row(p).lse, 2000.0);
}

TEST(OracleRow, BiasIsAddedAfterTheSoftcap) {
  RowProblem p = scalar_problem(1.0, {0.0, 100.0}, {0.0, 1.0});
  p.causal = false;
  p.position = 11;
  p.softcap = 1.0;
  p.alibi_slope = 10.0;
  // Logits: 0 - 110 and 1 * tanh(100) - 100 = -99; a cap on the sum would make them equal.
  EXPECT_NEAR(attention_row(p).lse, -99.0, 1e-4);
}

TEST(OracleRow, WindowsCountFromThePosition) {
  RowProblem p = scalar_problem(0.0, {0, 0, 0, 0, 0, 0}, {1, 2, 4, 8, 16, 32});
  p.window_left = 1;
  EXPECT_DOUBLE_EQ(attention_row(p).out[0], 24.0);  // keys 4 and 5
  p.causal = false;
  p.position = 2;
  p.window_right = 0;
  EXPECT_DOUBLE_EQ(attention_row(p).out[0], 3.0);  // keys 1 and 2
  p.window_right = 2;
  EXPECT_DOUBLE_EQ(attention_row(p).out[0], 7.5);  // keys 1 to 4
  p.causal = true;
  EXPECT_DOUBLE_EQ(attention_row(p).out[0], 3.0);  // causal wins over window_right
  p.window_left = 0;
  EXPECT_DOUBLE_EQ(attention_row(p).out[0], 4.0);  // itself only
}

TEST(OracleRow, NoVisibleKeyGivesZeroAndMinusInfinity) {
  RowProblem p = scalar_problem(1.0, {1.0}, {1.0});
  p.position = -1;
  const RowResult r = attention_row(p);
  EXPECT_EQ(r.out[0], 0.0);
  EXPECT_EQ(r.lse, -std::numeric_limits<double>::infinity());
  EXPECT_EQ(r.visible_keys, 0);
}

TEST(OracleRow, KeysThatTheMaskHidesAreNotRead) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  RowProblem p = scalar_problem(1.0, {nan, 0.0, nan}, {nan, 2.0, nan});
  p.position = 1;
  p.window_left = 0;
  EXPECT_DOUBLE_EQ(attention_row(p).out[0], 2.0);
}

TEST(OracleRow, HugeLogitsDoNotOverflow) {
  const RowResult r = attention_row(scalar_problem(1.0, {1e4, 1e4}, {1.0, 3.0}));
  EXPECT_DOUBLE_EQ(r.out[0], 2.0);
  EXPECT_DOUBLE_EQ(r.lse, 1e4 + std::log(2.0));
}

}  // namespace
}  // namespace attend::oracle
