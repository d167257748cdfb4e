// SPDX-License-Identifier: Apache-2.0
#include "attend/core/dtype.h"

#include <gtest/gtest.h>

#include <array>

namespace attend {
namespace {

constexpr std::array kAll = {DType::f32, DType::f16, DType::bf16, DType::fp8_e4m3, DType::fp8_e5m2,
                             DType::i8,  DType::u8,  DType::i32,  DType::i64};

TEST(DTypeTest, OwnNamesRoundTrip) {
  for (const DType t : kAll) EXPECT_EQ(parse_dtype(to_string(t)), t) << to_string(t);
}

TEST(DTypeTest, AcceptsTheFieldsNames) {
  EXPECT_EQ(parse_dtype("bfloat16"), DType::bf16);
  EXPECT_EQ(parse_dtype("float16"), DType::f16);
  EXPECT_EQ(parse_dtype("half"), DType::f16);
  EXPECT_EQ(parse_dtype("float32"), DType::f32);
  EXPECT_EQ(parse_dtype("fp8"), DType::fp8_e4m3);
  EXPECT_EQ(parse_dtype("int8"), DType::i8);
}

TEST(DTypeTest, RefusesUnknownNames) {
  for (const char* name : {"", "auto", "BF16", "bf16 ", "f64", "fp8_"}) {
    EXPECT_EQ(parse_dtype(name), std::nullopt) << name;
  }
}

TEST(DTypeTest, Sizes) {
  EXPECT_EQ(size_of(DType::i64), 8U);
  EXPECT_EQ(size_of(DType::f32), 4U);
  EXPECT_EQ(size_of(DType::i32), 4U);
  EXPECT_EQ(size_of(DType::f16), 2U);
  EXPECT_EQ(size_of(DType::bf16), 2U);
  for (const DType t : {DType::fp8_e4m3, DType::fp8_e5m2, DType::i8, DType::u8}) {
    EXPECT_EQ(size_of(t), 1U) << to_string(t);
  }
}

}  // namespace
}  // namespace attend
