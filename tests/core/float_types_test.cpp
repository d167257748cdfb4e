// SPDX-License-Identifier: Apache-2.0
#include "attend/core/float_types.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/random.h"

namespace attend {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Value of a code by the definition of the format, in double.
double decode_by_definition(std::uint32_t code, int mantissa_bits, int bias) {
  const int exponent = static_cast<int>(code >> mantissa_bits);
  const double mantissa = code & ((1U << mantissa_bits) - 1U);
  const double unit = std::ldexp(1.0, -mantissa_bits);
  if (exponent == 0) return std::ldexp(mantissa * unit, 1 - bias);
  return std::ldexp(1.0 + mantissa * unit, exponent - bias);
}

// Nearest code (ties to the even code) of a magnitude, by search: independent of bit tricks.
// Codes 0 .. largest are ascending in value.
std::uint32_t encode_by_search(double magnitude, std::uint32_t largest, int mantissa_bits,
                               int bias) {
  std::uint32_t low = 0;
  std::uint32_t high = largest;
  while (low < high) {  // first code >= magnitude
    const std::uint32_t middle = (low + high) / 2;
    if (decode_by_definition(middle, mantissa_bits, bias) < magnitude) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0) return 0;
  const double above = decode_by_definition(low, mantissa_bits, bias) - magnitude;
  const double below = magnitude - decode_by_definition(low - 1, mantissa_bits, bias);
  if (above != below) return above < below ? low : low - 1;
  return low % 2 == 0 ? low : low - 1;
}

struct F16Format {
  static constexpr int kMantissa = 10, kBias = 15;
  static constexpr std::uint32_t kCodes = 0x10000, kSign = 0x8000, kLargest = 0x7BFF;
  static float decode(std::uint32_t c) { return to_f32(f16{static_cast<std::uint16_t>(c)}); }
  static std::uint32_t encode(float x) { return to_f16(x).bits; }
};
struct E4m3Format {
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr std::uint32_t kCodes = 0x100, kSign = 0x80, kLargest = 0x7E;
  static float decode(std::uint32_t c) { return to_f32(fp8_e4m3{static_cast<std::uint8_t>(c)}); }
  static std::uint32_t encode(float x) { return to_fp8_e4m3(x).bits; }
};
struct E5m2Format {
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr std::uint32_t kCodes = 0x100, kSign = 0x80, kLargest = 0x7B;
  static float decode(std::uint32_t c) { return to_f32(fp8_e5m2{static_cast<std::uint8_t>(c)}); }
  static std::uint32_t encode(float x) { return to_fp8_e5m2(x).bits; }
};
struct Bf16Format {
  static constexpr int kMantissa = 7, kBias = 127;
  static constexpr std::uint32_t kCodes = 0x10000, kSign = 0x8000, kLargest = 0x7F7F;
  static float decode(std::uint32_t c) { return to_f32(bf16{static_cast<std::uint16_t>(c)}); }
  static std::uint32_t encode(float x) { return to_bf16(x).bits; }
};

template <typename F>
class FloatFormatTest : public ::testing::Test {};
using Formats = ::testing::Types<F16Format, E4m3Format, E5m2Format, Bf16Format>;
TYPED_TEST_SUITE(FloatFormatTest, Formats);

TYPED_TEST(FloatFormatTest, EveryFiniteCodeDecodesByDefinitionAndRoundTrips) {
  using F = TypeParam;
  for (std::uint32_t code = 0; code < F::kCodes; ++code) {
    const std::uint32_t magnitude = code & (F::kSign - 1);
    if (magnitude > F::kLargest) continue;
    const double value = decode_by_definition(magnitude, F::kMantissa, F::kBias);
    ASSERT_EQ(F::decode(code), code == magnitude ? value : -value) << code;
    ASSERT_EQ(std::signbit(F::decode(code)), code != magnitude) << code;
    ASSERT_EQ(F::encode(F::decode(code)), code);
  }
}

TYPED_TEST(FloatFormatTest, EveryNanCodeStaysNanWithItsSign) {
  using F = TypeParam;
  int nans = 0;
  for (std::uint32_t code = 0; code < F::kCodes; ++code) {
    const float value = F::decode(code);
    if (!std::isnan(value)) continue;
    ++nans;
    ASSERT_EQ(std::signbit(value), (code & F::kSign) != 0) << code;
    const std::uint32_t again = F::encode(value);
    ASSERT_TRUE(std::isnan(F::decode(again))) << code;
    ASSERT_EQ(again & F::kSign, code & F::kSign) << code;
  }
  EXPECT_GT(nans, 0);
  EXPECT_TRUE(std::isnan(F::decode(F::encode(kNan))));
  // A NaN whose payload sits only in the low bits must not become infinity.
  EXPECT_TRUE(std::isnan(F::decode(F::encode(std::bit_cast<float>(0x7F800001U)))));
}

TYPED_TEST(FloatFormatTest, HalfwayRoundsToEvenAndNeighboursToNearest) {
  using F = TypeParam;
  for (std::uint32_t code = 0; code < F::kLargest; ++code) {
    const float low = F::decode(code);
    const float high = F::decode(code + 1);
    const float middle = low / 2 + high / 2;
    if (static_cast<double>(middle) * 2 != static_cast<double>(low) + high) continue;  // bf16 tiny
    const std::uint32_t even = code % 2 == 0 ? code : code + 1;
    ASSERT_EQ(F::encode(middle), even) << code;
    ASSERT_EQ(F::encode(-middle), even | F::kSign) << code;
    ASSERT_EQ(F::encode(std::nextafter(middle, 0.0F)), code);
    ASSERT_EQ(F::encode(std::nextafter(middle, kInf)), code + 1);
  }
}

TYPED_TEST(FloatFormatTest, RandomFloatsMatchTheSearchInDouble) {
  using F = TypeParam;
  testing::Rng rng(7);
  SCOPED_TRACE(rng.trace());
  const double largest = decode_by_definition(F::kLargest, F::kMantissa, F::kBias);
  for (int i = 0; i < 200000; ++i) {
    const auto bits = static_cast<std::uint32_t>(rng.next());
    const float x = std::bit_cast<float>(bits);
    if (std::isnan(x) || std::abs(x) > largest) continue;
    const std::uint32_t want = encode_by_search(std::abs(x), F::kLargest, F::kMantissa, F::kBias);
    ASSERT_EQ(F::encode(x), want | (std::signbit(x) ? F::kSign : 0U)) << bits;
  }
}

TEST(FloatTypesTest, F16OverflowsToInfinityFromHalfAnUlpAboveTheLargest) {
  EXPECT_EQ(to_f16(65504.0F).bits, 0x7BFF);
  EXPECT_EQ(to_f16(65519.996F).bits, 0x7BFF);
  EXPECT_EQ(to_f16(65520.0F).bits, 0x7C00);
  EXPECT_EQ(to_f16(-3.0e38F).bits, 0xFC00);
  EXPECT_EQ(to_f16(kInf).bits, 0x7C00);
  EXPECT_EQ(to_f32(f16{0xFC00}), -kInf);
}

TEST(FloatTypesTest, F16SmallestSubnormal) {
  EXPECT_EQ(to_f32(f16{1}), 0x1p-24F);
  EXPECT_EQ(to_f16(0x1p-25F).bits, 0);  // tie to even
  EXPECT_EQ(to_f16(0x1.000002p-25F).bits, 1);
  EXPECT_EQ(to_f16(-0x1p-126F).bits, 0x8000);
  EXPECT_EQ(to_f16(0x1p-149F).bits, 0);
}

TEST(FloatTypesTest, F16NanKeepsSignAndUpperPayloadAndBecomesQuiet) {
  EXPECT_EQ(to_f16(std::bit_cast<float>(0xFF802000U)).bits, 0xFE01);
  EXPECT_EQ(std::bit_cast<std::uint32_t>(to_f32(f16{0x7C01})), 0x7FC02000U);
}

TEST(FloatTypesTest, Bf16OverflowsToInfinityAndKeepsSubnormals) {
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::max()).bits, 0x7F80);
  EXPECT_EQ(to_bf16(-kInf).bits, 0xFF80);
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x00010000U)).bits, 1);
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x7FBFFFFFU)).bits, 0x7FFF);
}

TEST(FloatTypesTest, Fp8Saturates) {
  for (const float big : {449.0F, 464.0F, 465.0F, 480.0F, 1e9F, 3.4e38F, kInf}) {
    EXPECT_EQ(to_fp8_e4m3(big).bits, 0x7E) << big;
    EXPECT_EQ(to_fp8_e4m3(-big).bits, 0xFE) << big;
  }
  EXPECT_EQ(to_f32(fp8_e4m3{0x7E}), 448.0F);
  for (const float big : {57345.0F, 61440.0F, 65536.0F, 3.4e38F, kInf}) {
    EXPECT_EQ(to_fp8_e5m2(big).bits, 0x7B) << big;
    EXPECT_EQ(to_fp8_e5m2(-big).bits, 0xFB) << big;
  }
  EXPECT_EQ(to_f32(fp8_e5m2{0x7B}), 57344.0F);
  EXPECT_EQ(to_f32(fp8_e5m2{0xFC}), -kInf);
}

}  // namespace
}  // namespace attend
