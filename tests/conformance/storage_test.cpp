// SPDX-License-Identifier: Apache-2.0
#include "conformance/storage.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "conformance/comparison.h"

namespace attend::conformance {
namespace {

using ::testing::HasSubstr;

Storage padded(Rng& rng, DType dtype) {
  Layout layout;
  layout.order = {1, 0, 2};
  layout.padded = true;
  return Storage(rng, dtype, {3, 2, 8}, layout);
}

TEST(Storage, StartsAsNanEverywhere) {
  Rng rng(1);
  for (const DType t : {DType::f32, DType::f16, DType::bf16}) {
    const Storage s = padded(rng, t);
    for (std::int64_t i = 0; i < 48; ++i) EXPECT_TRUE(std::isnan(s.get(i)));
  }
}

TEST(Storage, NoticesAWriteOutsideTheElements) {
  Rng rng(1);
  Storage s = padded(rng, DType::f32);
  s.freeze();
  s.reset();
  for (const std::int64_t offset : s.offsets()) {
    s.set(offset, 1.0);
    s.accept(offset);
  }
  EXPECT_EQ(s.damage(), "");
  s.set(s.offset({0, 0, 0}) - 1, 1.0);
  EXPECT_THAT(s.damage(), HasSubstr("byte -4"));
}

TEST(Storage, ResetPutsTheStateBeforeTheOpBack) {
  Rng rng(1);
  Storage s = padded(rng, DType::bf16);
  s.set_random(rng, 1.0);
  const double before = s.get(0);
  s.freeze();
  s.set(0, 77.0);
  s.reset();
  EXPECT_EQ(s.get(0), before);
  EXPECT_EQ(s.damage(), "");
}

TEST(Comparison, MeasuresErrorsAgainstTheBound) {
  const auto where = [] { return std::string("out[3]"); };
  Outcome outcome;
  compare(outcome, 1.0, 1.25, 0.5, where);
  EXPECT_FALSE(outcome.failed());
  EXPECT_EQ(outcome.worst_error, 0.25);
  EXPECT_EQ(outcome.worst_ratio, 0.5);
  compare(outcome, 1.0, 3.0, 0.5, where);
  EXPECT_THAT(outcome.failure, HasSubstr("out[3]"));
  EXPECT_EQ(outcome.worst_ratio, 4.0);
}

TEST(Comparison, NanAndInfinityOnlyMatchThemselvesWhereExpected) {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto fails = [](double got, double expected, double bound) {
    Outcome outcome;
    compare(outcome, got, expected, bound, [] { return std::string(); });
    return outcome.failed();
  };
  EXPECT_FALSE(fails(-inf, -inf, 0.0));
  EXPECT_TRUE(fails(inf, -inf, 1.0));
  EXPECT_TRUE(fails(nan, 0.0, 1.0));
  EXPECT_TRUE(fails(0.0, -inf, 1.0));
  EXPECT_TRUE(fails(1e-30, 0.0, 0.0));
  EXPECT_FALSE(fails(0.0, 0.0, 0.0));
}

}  // namespace
}  // namespace attend::conformance
