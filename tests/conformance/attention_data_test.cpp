// SPDX-License-Identifier: Apache-2.0
#include "conformance/attention_data.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "attend/core/error.h"
#include "attend/core/float_types.h"

namespace attend::conformance {
namespace {

constexpr DataShape kShape{.queries = 48, .keys = 512, .head_size = 64};

/// Mean of channel `c` over the rows.
double mean_of(const std::vector<double>& rows, int c) {
  double sum = 0.0;
  for (std::size_t i = static_cast<std::size_t>(c); i < rows.size(); i += 64) sum += rows[i];
  return sum / (static_cast<double>(rows.size()) / 64.0);
}

int large_channels(const AttentionData& data) {
  int count = 0;
  for (int c = 0; c < 64; ++c) count += std::abs(mean_of(data.k, c)) > 7.0 ? 1 : 0;
  return count;
}

double largest(const std::vector<double>& values) {
  return std::abs(*std::max_element(values.begin(), values.end(),
                                    [](double a, double b) { return std::abs(a) < std::abs(b); }));
}

TEST(AttentionData, IsAFunctionOfSeedKindAndShapeThatBf16Holds) {
  for (const DataKind kind : kDataKinds) {
    const AttentionData a = make_attention_data(kind, kShape, 3);
    const AttentionData b = make_attention_data(kind, kShape, 3);
    EXPECT_EQ(a.q, b.q) << to_string(kind);
    EXPECT_EQ(a.k, b.k) << to_string(kind);
    EXPECT_EQ(a.v, b.v) << to_string(kind);
    EXPECT_NE(a.k, make_attention_data(kind, kShape, 4).k) << to_string(kind);
    EXPECT_EQ(a.q.size(), 48U * 64U);
    EXPECT_EQ(a.v.size(), 512U * 64U);
    for (const double x : a.k) EXPECT_EQ(x, to_f32(to_bf16(static_cast<float>(x))));
  }
}

TEST(AttentionData, OutliersAreWhereTheKindSays) {
  const AttentionData iid = make_attention_data(DataKind::iid, kShape, 1);
  EXPECT_LT(largest(iid.k), 6.0);
  EXPECT_NEAR(std::inner_product(iid.k.begin(), iid.k.end(), iid.k.begin(), 0.0) /
                  static_cast<double>(iid.k.size()),
              1.0, 0.05);
  EXPECT_GT(largest(make_attention_data(DataKind::outliers, kShape, 1).k), 12.0);

  EXPECT_EQ(large_channels(iid), 0);
  EXPECT_EQ(large_channels(make_attention_data(DataKind::channels, kShape, 1)), 8);
}

TEST(AttentionData, RotationMovesTheLargeChannelsAndKeepsEveryProduct) {
  const AttentionData plain = make_attention_data(DataKind::channels, kShape, 1);
  const AttentionData rotated = make_attention_data(DataKind::rotated_channels, kShape, 1);
  EXPECT_LT(large_channels(rotated), 8);
  EXPECT_EQ(rotated.v, plain.v);
  // The last query and the last key stand at the same position: their product does not change.
  double before = 0.0, after = 0.0, magnitude = 0.0;
  for (std::size_t d = 0; d < 64; ++d) {
    before += plain.q[47 * 64 + d] * plain.k[511 * 64 + d];
    after += rotated.q[47 * 64 + d] * rotated.k[511 * 64 + d];
    magnitude += std::abs(plain.q[47 * 64 + d] * plain.k[511 * 64 + d]);
  }
  EXPECT_NEAR(after, before, magnitude * 4 * 0x1p-8);  // both rows are rounded to bf16
}

TEST(AttentionData, TheSinkTakesItsShareOfTheSoftmax) {
  const AttentionData data = make_attention_data(DataKind::sink, kShape, 1);
  double mass = 0.0;
  for (std::size_t i = 0; i < 48; ++i) {
    double sum = 0.0, first = 0.0;
    for (std::size_t j = 0; j < 512; ++j) {
      double dot = 0.0;
      for (std::size_t d = 0; d < 64; ++d) dot += data.q[i * 64 + d] * data.k[j * 64 + d];
      sum += std::exp(dot / 8.0);
      if (j == 0) first = sum;
    }
    mass += first / sum / 48.0;
  }
  EXPECT_GT(mass, 0.4);
  EXPECT_LT(mass, 0.7);
}

TEST(AttentionData, ShapesOutOfRangeAreRefused) {
  for (const DataShape shape : {DataShape{0, 4, 8}, DataShape{1, 1, 8}, DataShape{1, 4, 0},
                                DataShape{1, 4, 12}, DataShape{1, 4, -8}, DataShape{1, 4, 264}}) {
    EXPECT_THROW(make_attention_data(DataKind::iid, shape, 1), InvalidArgument);
  }
}

}  // namespace
}  // namespace attend::conformance
