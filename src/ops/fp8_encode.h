// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cstdint>

/// Branch-free forms of to_fp8_e4m3 and to_fp8_e5m2, which compilers turn into vector code.
namespace attend {

struct E4m3Encoding {
  static constexpr int kMantissaBits = 3, kBias = 7;
  static constexpr float kLargest = 448.0F;
};
struct E5m2Encoding {
  static constexpr int kMantissaBits = 2, kBias = 15;
  static constexpr float kLargest = 57344.0F;
};

/// The code that to_fp8_* gives: nearest even, saturating, NaN to NaN.
template <typename Format>
std::uint8_t encode_fp8(float x) noexcept {
  constexpr int kDrop = 23 - Format::kMantissaBits;
  constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(127 - Format::kBias) << 23;
  constexpr std::uint32_t kSmallestNormal = kRebias + (1U << 23);
  // Adding 2^23 units of the format's subnormals leaves their count in the lowest bits, rounded to
  // nearest even by the addition.
  constexpr std::uint32_t kShifter =
      static_cast<std::uint32_t>(127 + 24 - Format::kBias - Format::kMantissaBits) << 23;
  constexpr std::uint32_t kInfinity = 0x7F800000U;

  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t abs_bits = bits & 0x7FFFFFFFU;
  constexpr auto kLargestBits = std::bit_cast<std::uint32_t>(Format::kLargest);
  const std::uint32_t clamped = abs_bits < kLargestBits ? abs_bits : kLargestBits;
  const std::uint32_t odd = (clamped >> kDrop) & 1U;
  const std::uint32_t normal = (clamped - kRebias + (1U << (kDrop - 1)) - 1U + odd) >> kDrop;
  const float shifted = std::bit_cast<float>(clamped) + std::bit_cast<float>(kShifter);
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(shifted) - kShifter;
  const std::uint32_t finite = clamped < kSmallestNormal ? subnormal : normal;
  const std::uint32_t magnitude = abs_bits > kInfinity ? 0x7FU : finite;
  return static_cast<std::uint8_t>(magnitude | ((bits >> 24) & 0x80U));
}

}  // namespace attend
