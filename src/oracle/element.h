// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "attend/core/tensor_view.h"
#include "attend/oracle/quantize.h"

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

/// Element of a floating-point tensor, or int8 code, at an offset in elements.
inline double element(const ConstTensorView& t, std::int64_t offset) noexcept {
  if (t.dtype == DType::f32) return static_cast<const float*>(t.data)[offset];
  if (t.dtype == DType::i8) return static_cast<const std::int8_t*>(t.data)[offset];
  if (is_fp8(t.dtype)) return fp8_value(t.dtype, static_cast<const std::uint8_t*>(t.data)[offset]);
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
