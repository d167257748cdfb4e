// SPDX-License-Identifier: Apache-2.0
#include "serving/content.h"

#include <gmock/gmock.h>

#include <cmath>
#include <set>

#include "attend/core/error.h"
#include "attend/core/float_types.h"

namespace attend::serving {
namespace {

Request request(std::int64_t id, std::int64_t prompt, std::vector<ContentSegment> segments) {
  Request r;
  r.id = id;
  r.prompt_tokens = prompt;
  r.output_tokens = 10;
  r.segments = std::move(segments);
  return r;
}

std::vector<float> row(const ValueGenerator& g, const RowKey& key, int count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  g.fill_f32(key, count, values.data());
  return values;
}

TEST(Content, TokensOfEqualSegmentsAreEqualAndOthersDiffer) {
  const Request a = request(0, 20, {{7, 8}, {8, 16}}), b = request(1, 20, {{7, 8}, {9, 16}});
  EXPECT_EQ(content_id(a, 0), content_id(b, 0));
  EXPECT_EQ(content_id(a, 7), content_id(b, 7));
  EXPECT_NE(content_id(a, 8), content_id(b, 8));
  EXPECT_NE(content_id(a, 16), content_id(b, 16)) << "beyond the segments";
  EXPECT_EQ(content_id(a, 16), own_content_id(a));
  EXPECT_EQ(content_id(a, 25), own_content_id(a)) << "generated";
}

TEST(Content, RequestAndSegmentIdsDoNotMeet) {
  std::set<std::uint64_t> ids;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    ids.insert(content_id(request(5000, 4, {{i, 4}}), 0));
    ids.insert(own_content_id(request(static_cast<std::int64_t>(i), 1, {})));
  }
  EXPECT_EQ(ids.size(), 2000U);
}

TEST(Content, BlockHashesDependOnContentAndParent) {
  const Request a = request(0, 32, {{7, 16}, {8, 32}}), b = request(1, 32, {{7, 16}, {9, 32}});
  EXPECT_EQ(block_hash(0, a, 0, 16), block_hash(0, b, 0, 16));
  EXPECT_NE(block_hash(0, a, 16, 32), block_hash(0, b, 16, 32));
  EXPECT_NE(block_hash(1, a, 0, 16), block_hash(2, a, 0, 16));
  EXPECT_NE(block_hash(0, a, 0, 16), block_hash(0, a, 0, 15));
}

TEST(ValueGenerator, EveryPartOfTheKeyMatters) {
  const ValueGenerator g(1, DType::f32);
  const RowKey base{.content = 5, .position = 6, .layer = 1, .head = 2, .kind = ValueKind::key};
  const auto values = row(g, base, 16);
  EXPECT_EQ(values, row(g, base, 16));
  for (const RowKey& other :
       {RowKey{6, 6, 1, 2, ValueKind::key}, RowKey{5, 7, 1, 2, ValueKind::key},
        RowKey{5, 6, 2, 2, ValueKind::key}, RowKey{5, 6, 1, 1, ValueKind::key},
        RowKey{5, 6, 1, 2, ValueKind::value}, RowKey{5, 6, 1, 2, ValueKind::query}}) {
    EXPECT_NE(values, row(g, other, 16));
  }
  EXPECT_NE(values, row(ValueGenerator(2, DType::f32), base, 16));
}

TEST(ValueGenerator, AShorterRowIsTheBeginningOfALongerOne) {
  const ValueGenerator g(1, DType::f32);
  const RowKey key{.content = 5, .position = 6};
  const auto longer = row(g, key, 24);
  for (int n = 1; n < 24; ++n) {
    const auto shorter = row(g, key, n);
    EXPECT_TRUE(std::equal(shorter.begin(), shorter.end(), longer.begin())) << n;
  }
}

TEST(ValueGenerator, ValuesHaveMeanZeroAndVarianceOne) {
  const ValueGenerator g(3, DType::f32);
  double sum = 0, squares = 0;
  constexpr int kRows = 1000, kDims = 128;
  for (int i = 0; i < kRows; ++i) {
    for (const float v : row(g, {.content = 1, .position = i}, kDims)) {
      ASSERT_LT(std::abs(v), 1.7321F);
      sum += v;
      squares += static_cast<double>(v) * v;
    }
  }
  // Five standard deviations of the estimates: 1/sqrt(n) and sqrt(0.8/n).
  const double n = static_cast<double>(kRows) * kDims;
  EXPECT_NEAR(sum / n, 0.0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1.0, 5 * std::sqrt(0.8 / n));
}

// Neighbouring rows must not be correlated, or a wrong slot could go unnoticed.
TEST(ValueGenerator, NeighbouringRowsAreUncorrelated) {
  const ValueGenerator g(3, DType::f32);
  constexpr int kRows = 2000, kDims = 64;
  double product = 0;
  for (int i = 0; i < kRows; ++i) {
    const auto a = row(g, {.content = 1, .position = i}, kDims);
    const auto b = row(g, {.content = 1, .position = i + 1}, kDims);
    for (int d = 0; d < kDims; ++d) product += static_cast<double>(a[d]) * b[d];
  }
  const double n = static_cast<double>(kRows) * kDims;
  EXPECT_NEAR(product / n, 0.0, 5 / std::sqrt(n));
}

TEST(ValueGenerator, SixteenBitRowsAreTheRoundedFloatRow) {
  const ValueGenerator exact(1, DType::f32), half(1, DType::f16), brain(1, DType::bf16);
  const RowKey key{.content = 5, .position = 6};
  const auto values = row(exact, key, 32);
  std::vector<f16> h(32);
  std::vector<bf16> b(32);
  half.fill(key, 32, h.data());
  brain.fill(key, 32, b.data());
  for (std::size_t i = 0; i < 32; ++i) {
    EXPECT_EQ(h[i].bits, to_f16(values[i]).bits);
    EXPECT_EQ(b[i].bits, to_bf16(values[i]).bits);
    EXPECT_EQ(to_f32(b[i]), row(brain, key, 32)[i]);
    EXPECT_EQ(to_f32(h[i]), row(half, key, 32)[i]);
  }
}

TEST(ValueGenerator, RefusesOtherTypes) {
  EXPECT_THROW(ValueGenerator(1, DType::i8), InvalidArgument);
}

}  // namespace
}  // namespace attend::serving
