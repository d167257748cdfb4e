// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/float_types.h"
#include "attend/core/tensor_view.h"

namespace attend::bench {

/// Counter-based random bits: the i-th number of a stream, without state.
inline std::uint64_t hash64(std::uint64_t x) noexcept {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// Uniform in [-sqrt(3), sqrt(3)): variance 1.
inline float random_value(std::uint64_t seed, std::uint64_t i) noexcept {
  const auto bits = static_cast<std::uint32_t>(hash64(seed * 0x100000001b3ULL + i) >> 40);
  return (static_cast<float>(bits) * 0x1p-24F - 0.5F) * 3.4641016F;
}

/// Elements [begin, end) of a buffer.
struct Elements {
  std::int64_t begin, end;
};

template <typename T>
void fill_random(T* to, Elements part, std::uint64_t seed) noexcept {
  for (std::int64_t i = part.begin; i < part.end; ++i)
    to[i] = from_f32<T>(random_value(seed, static_cast<std::uint64_t>(i)));
}

/// Fills some elements of a buffer of `dtype`; what an element becomes depends on seed and place
/// only.
inline void fill_random(void* to, DType dtype, Elements part, std::uint64_t seed) noexcept {
  if (dtype == DType::f32) fill_random(static_cast<float*>(to), part, seed);
  if (dtype == DType::f16) fill_random(static_cast<f16*>(to), part, seed);
  if (dtype == DType::bf16) fill_random(static_cast<bf16*>(to), part, seed);
  if (dtype == DType::fp8_e4m3) fill_random(static_cast<fp8_e4m3*>(to), part, seed);
  if (dtype == DType::fp8_e5m2) fill_random(static_cast<fp8_e5m2*>(to), part, seed);
}

/// Element `i` of a buffer of a floating-point `dtype`.
inline float value_at(const void* from, DType dtype, std::int64_t i) noexcept {
  if (dtype == DType::f32) return static_cast<const float*>(from)[i];
  if (dtype == DType::f16) return to_f32(static_cast<const f16*>(from)[i]);
  if (dtype == DType::fp8_e4m3) return to_f32(static_cast<const fp8_e4m3*>(from)[i]);
  if (dtype == DType::fp8_e5m2) return to_f32(static_cast<const fp8_e5m2*>(from)[i]);
  return to_f32(static_cast<const bf16*>(from)[i]);
}

}  // namespace attend::bench
