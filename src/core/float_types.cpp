// SPDX-License-Identifier: Apache-2.0
#include "attend/core/float_types.h"

namespace attend {
namespace {

constexpr std::uint32_t kAbsMask = 0x7FFFFFFFU;
constexpr std::uint32_t kInfinity = 0x7F800000U;
constexpr std::uint32_t kMantissaMask = 0x007FFFFFU;
constexpr std::uint32_t kHiddenBit = 0x00800000U;

std::uint32_t shift_round_even(std::uint32_t v, int shift) noexcept {
  return (v + (1U << (shift - 1)) - 1U + ((v >> shift) & 1U)) >> shift;
}

// Code without sign of a non-NaN magnitude in a format with `mantissa_bits` and `bias`. May exceed
// the format's largest code: the caller clamps.
std::uint32_t encode_magnitude(std::uint32_t abs_bits, int mantissa_bits, int bias) noexcept {
  const int exponent = static_cast<int>(abs_bits >> 23) - 127;
  const int smallest_normal = 1 - bias;
  const int drop = 23 - mantissa_bits;
  if (exponent >= smallest_normal) {
    const auto rebias = static_cast<std::uint32_t>(127 - bias) << 23;
    return shift_round_even(abs_bits - rebias, drop);
  }
  const int shift = drop + smallest_normal - exponent;
  if (shift > 24) return 0;  // below half of the smallest subnormal
  return shift_round_even((abs_bits & kMantissaMask) | kHiddenBit, shift);
}

// Value of a finite code without sign.
float decode_magnitude(std::uint32_t code, int mantissa_bits, int bias) noexcept {
  const std::uint32_t exponent = code >> mantissa_bits;
  const std::uint32_t mantissa = code & ((1U << mantissa_bits) - 1U);
  if (exponent == 0) {
    const auto unit_exponent = static_cast<std::uint32_t>(127 + 1 - bias - mantissa_bits);
    return static_cast<float>(mantissa) * std::bit_cast<float>(unit_exponent << 23);
  }
  const auto rebias = static_cast<std::uint32_t>(127 - bias) << 23;
  return std::bit_cast<float>((code << (23 - mantissa_bits)) + rebias);
}

float with_sign(float magnitude, std::uint32_t sign_bit) noexcept {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign_bit);
}

float nan_with(std::uint32_t sign_bit, std::uint32_t payload) noexcept {
  return std::bit_cast<float>(sign_bit | kInfinity | 0x00400000U | payload);
}

std::uint8_t encode_fp8(float x, int mantissa_bits, int bias, std::uint32_t largest,
                        std::uint32_t nan) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t abs_bits = bits & kAbsMask;
  const std::uint32_t sign = (bits >> 24) & 0x80U;
  if (abs_bits > kInfinity) return static_cast<std::uint8_t>(sign | nan);
  const std::uint32_t code = encode_magnitude(abs_bits, mantissa_bits, bias);
  return static_cast<std::uint8_t>(sign | (code > largest ? largest : code));
}

}  // namespace

float to_f32(f16 x) noexcept {
  const std::uint32_t sign = (x.bits & 0x8000U) << 16;
  const std::uint32_t code = x.bits & 0x7FFFU;
  if (code == 0x7C00U) return std::bit_cast<float>(sign | kInfinity);
  if (code > 0x7C00U) return nan_with(sign, (code & 0x3FFU) << 13);
  return with_sign(decode_magnitude(code, 10, 15), sign);
}

float to_f32(fp8_e4m3 x) noexcept {
  const std::uint32_t sign = (x.bits & 0x80U) << 24;
  const std::uint32_t code = x.bits & 0x7FU;
  if (code == 0x7FU) return nan_with(sign, 0);
  return with_sign(decode_magnitude(code, 3, 7), sign);
}

float to_f32(fp8_e5m2 x) noexcept {
  // Upper byte of binary16 with the same exponent.
  return to_f32(f16{static_cast<std::uint16_t>(x.bits << 8)});
}

bf16 to_bf16(float x) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & kAbsMask) > kInfinity) {
    return {static_cast<std::uint16_t>((bits >> 16) | 0x0040U)};
  }
  return {
      static_cast<std::uint16_t>(shift_round_even(bits & kAbsMask, 16) | ((bits >> 16) & 0x8000U))};
}

f16 to_f16(float x) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t abs_bits = bits & kAbsMask;
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  if (abs_bits > kInfinity) {
    const std::uint32_t payload = (abs_bits & kMantissaMask) >> 13;
    return {static_cast<std::uint16_t>(sign | 0x7E00U | payload)};
  }
  const std::uint32_t code = encode_magnitude(abs_bits, 10, 15);
  return {static_cast<std::uint16_t>(sign | (code > 0x7C00U ? 0x7C00U : code))};
}

fp8_e4m3 to_fp8_e4m3(float x) noexcept { return {encode_fp8(x, 3, 7, 0x7EU, 0x7FU)}; }

fp8_e5m2 to_fp8_e5m2(float x) noexcept { return {encode_fp8(x, 2, 15, 0x7BU, 0x7FU)}; }

}  // namespace attend
