// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attend/core/dtype.h"
#include "attend/core/float_types.h"

/// int8 codes and their scales; loops that compilers turn into vector code.
namespace attend::int8 {

inline constexpr float kLargest = 127.0F;
inline constexpr float kSmallestScale = 1e-6F;

/// Magnitudes as bits: they order like the numbers, with infinity and every NaN above the rest.
inline std::uint32_t magnitude_bits(float x) noexcept {
  return std::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFU;
}

/// Largest magnitude of n values, as bits.
template <typename T>
std::uint32_t largest_magnitude_bits(const T* x, std::int64_t n) noexcept {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude_bits(to_f32(x[i])));
  return largest;
}

/// max(amax / 127, 1e-6), NaN if amax is no finite number.
inline float scale_of(std::uint32_t amax_bits) noexcept {
  const float amax = std::bit_cast<float>(amax_bits);
  if (!std::isfinite(amax)) return std::numeric_limits<float>::quiet_NaN();
  return std::max(amax / kLargest, kSmallestScale);
}

/// Nearest integer to x / scale, ties to even, clamped to [-127, 127]; 0 if the quotient is NaN.
inline std::int8_t code_of(float x, float scale) noexcept {
  // The lowest mantissa bit of 1.5 * 2^23 + q counts ones: the addition rounds q to an integer.
  constexpr float kShifter = 0x1.8p23F;
  const float q = x / scale;
  const float known = q == q ? q : 0.0F;
  const float clamped = std::min(std::max(known, -kLargest), kLargest);
  return static_cast<std::int8_t>(std::bit_cast<std::int32_t>(clamped + kShifter) -
                                  std::bit_cast<std::int32_t>(kShifter));
}

/// Codes of n values with one scale.
template <typename T>
void encode(const T* x, std::int64_t n, float scale, std::int8_t* codes) noexcept {
  for (std::int64_t i = 0; i < n; ++i) codes[i] = code_of(to_f32(x[i]), scale);
}

/// Computes the scale of a row, writes its codes and returns the scale.
template <typename T>
float encode_row(const T* x, std::int64_t n, std::int8_t* codes) noexcept {
  const float scale = scale_of(largest_magnitude_bits(x, n));
  encode(x, n, scale, codes);
  return scale;
}

/// The same for x - mean.
template <typename T>
float encode_row_less(const T* x, const float* mean, std::int64_t n, std::int8_t* codes) noexcept {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i)
    largest = std::max(largest, magnitude_bits(to_f32(x[i]) - mean[i]));
  const float scale = scale_of(largest);
  for (std::int64_t i = 0; i < n; ++i) codes[i] = code_of(to_f32(x[i]) - mean[i], scale);
  return scale;
}

/// Calls f(T{}) with the element type of `dtype`. @pre f32, f16 or bf16.
template <typename F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16:
      f(f16{});
      break;
    case DType::bf16:
      f(bf16{});
      break;
    default:
      f(float{});
  }
}

}  // namespace attend::int8
