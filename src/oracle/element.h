// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "attend/core/tensor_view.h"

/// Reading and rounding of single elements. Decodes the formats itself instead of using
/// core/float_types.h, so that a wrong conversion there does not cancel out.
namespace attend::oracle {

/// Significand bits and smallest normal exponent of a floating-point format.
struct FloatFormat {
  int precision;     ///< bits of the significand, the implicit one included
  int min_exponent;  ///< of the smallest normal number, as ilogb() gives it
};
inline FloatFormat format_of(DType t) noexcept {
  if (t == DType::f16) return {11, -14};
  if (t == DType::bf16) return {8, -126};
  return {24, -126};
}

inline double decode_f16(std::uint16_t bits) noexcept {
  const int exponent = (bits >> 10) & 0x1f;
  const int fraction = bits & 0x3ff;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

/// An 8-bit code with that many fraction bits and that exponent bias; E4M3 has no infinity and one
/// NaN a sign, E5M2 is as IEEE would have it.
inline double decode_fp8(std::uint8_t bits, int fraction_bits, int bias) noexcept {
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int exponent = (bits & 0x7f) >> fraction_bits;
  const double sign = (bits & 0x80) != 0 ? -1.0 : 1.0;
  if (fraction_bits == 3 && (bits & 0x7f) == 0x7f) return std::numeric_limits<double>::quiet_NaN();
  if (fraction_bits == 2 && exponent == 31) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

/// Element of a floating-point tensor at an offset in elements.
inline double element(const ConstTensorView& t, std::int64_t offset) noexcept {
  if (t.dtype == DType::f32) return static_cast<const float*>(t.data)[offset];
  if (t.dtype == DType::fp8_e4m3)
    return decode_fp8(static_cast<const std::uint8_t*>(t.data)[offset], 3, 7);
  if (t.dtype == DType::fp8_e5m2)
    return decode_fp8(static_cast<const std::uint8_t*>(t.data)[offset], 2, 15);
  const std::uint16_t bits = static_cast<const std::uint16_t*>(t.data)[offset];
  if (t.dtype == DType::f16) return decode_f16(bits);
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}

/// Offset in elements of an index.
inline std::int64_t offset_of(const ConstTensorView& t,
                              std::initializer_list<std::int64_t> index) noexcept {
  std::int64_t offset = 0;
  int dim = 0;
  for (const std::int64_t i : index) offset += i * t.strides[dim++];
  return offset;
}

inline double at(const ConstTensorView& t, std::initializer_list<std::int64_t> index) noexcept {
  return element(t, offset_of(t, index));
}
inline std::int64_t int_at(const ConstTensorView& t,
                           std::initializer_list<std::int64_t> index) noexcept {
  return static_cast<const std::int32_t*>(t.data)[offset_of(t, index)];
}

/// Nearest value of the format, ties to even (the default rounding mode); no overflow handling.
inline double round_to(DType t, double x) noexcept {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const FloatFormat f = format_of(t);
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const double ulp = std::ldexp(1.0, exponent - f.precision + 1);
  return std::nearbyint(x / ulp) * ulp;
}

}  // namespace attend::oracle
