// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cstdint>

/// Storage types without arithmetic: convert explicitly. All conversions round to nearest even.
namespace attend {

/// bfloat16: upper half of a float32.
struct bf16 {
  std::uint16_t bits = 0;
};
/// IEEE binary16.
struct f16 {
  std::uint16_t bits = 0;
};
/// OCP FP8 E4M3 (no infinity, NaN = 0x7f/0xff, largest 448).
struct fp8_e4m3 {
  std::uint8_t bits = 0;
};
/// OCP FP8 E5M2 (IEEE-like, infinity and NaN, largest finite 57344).
struct fp8_e5m2 {
  std::uint8_t bits = 0;
};

inline float to_f32(float x) noexcept { return x; }
inline float to_f32(bf16 x) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
float to_f32(f16 x) noexcept;
float to_f32(fp8_e4m3 x) noexcept;
float to_f32(fp8_e5m2 x) noexcept;

bf16 to_bf16(float x) noexcept;
f16 to_f16(float x) noexcept;
/// Saturating: values beyond +-448 (infinities too) give +-448; NaN stays NaN.
fp8_e4m3 to_fp8_e4m3(float x) noexcept;
/// Saturating: values beyond +-57344 (infinities too) give +-57344; NaN stays NaN.
fp8_e5m2 to_fp8_e5m2(float x) noexcept;

/// Converts from float32 to the storage type T.
template <typename T>
T from_f32(float x) noexcept;
template <>
inline float from_f32<float>(float x) noexcept {
  return x;
}
template <>
inline bf16 from_f32<bf16>(float x) noexcept {
  return to_bf16(x);
}
template <>
inline f16 from_f32<f16>(float x) noexcept {
  return to_f16(x);
}
template <>
inline fp8_e4m3 from_f32<fp8_e4m3>(float x) noexcept {
  return to_fp8_e4m3(x);
}
template <>
inline fp8_e5m2 from_f32<fp8_e5m2>(float x) noexcept {
  return to_fp8_e5m2(x);
}

}  // namespace attend
