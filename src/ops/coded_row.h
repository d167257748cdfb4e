// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attend/cache/row_format.h"
#include "attend/core/float_types.h"
#include "attend/core/tensor_view.h"
#include "ops/fp8_encode.h"

/// Rows of a RowFormat; loops that compilers turn into vector code.
namespace attend::coded_row {

inline constexpr std::uint16_t kBf16Infinity = 0x7F80U;
inline constexpr std::uint16_t kBf16Nan = 0x7FC0U;
inline constexpr float kSmallestAmax = 1e-4F;  ///< of RowScale::ue8m0
inline constexpr std::uint32_t kExponentOfNan = 255;

/// A row and its scales in a cache.
struct Place {
  std::uint8_t* row;
  std::uint8_t* scales;
};

/// Where the row at `offset` of the block lies that begins at `block`.
inline Place place(const RowFormat& f, std::uint8_t* block, std::int64_t block_size,
                   std::int64_t row_stride, std::int64_t offset) noexcept {
  if (!f.scales_apart) {
    std::uint8_t* row = block + offset * row_stride;
    return {row, row + f.scales_at};
  }
  return {block + offset * f.step, block + block_size * f.step + offset * f.scale_bytes};
}

/// Scale of the largest finite magnitude of a tile.
inline float scale_of(RowScale kind, const bf16* x, int tile) noexcept {
  std::uint16_t amax = 0;
  for (int i = 0; i < tile; ++i) {
    const auto magnitude = static_cast<std::uint16_t>(x[i].bits & 0x7FFFU);
    const auto finite = static_cast<std::uint16_t>(magnitude < kBf16Infinity ? magnitude : 0U);
    amax = std::max(amax, finite);
  }
  if (kind == RowScale::f32) return std::max(to_f32(bf16{amax}) / E4m3Encoding::kLargest, FLT_MIN);
  const float least = std::max(to_f32(bf16{amax}), kSmallestAmax) / E4m3Encoding::kLargest;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(least) + 0x007FFFFFU) & 0xFF800000U);
}

inline void write_scale(RowScale kind, float scale, int tile, std::uint8_t* scales) noexcept {
  if (kind == RowScale::f32) {
    std::memcpy(scales + 4 * tile, &scale, sizeof scale);
  } else {
    scales[tile] = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(scale) >> 23);
  }
}

inline float read_scale(RowScale kind, const std::uint8_t* scales, int tile) noexcept {
  if (kind == RowScale::f32) {
    float scale;
    std::memcpy(&scale, scales + 4 * tile, sizeof scale);
    return scale;
  }
  const std::uint32_t exponent = scales[tile];
  if (exponent == kExponentOfNan) return std::numeric_limits<float>::quiet_NaN();
  return exponent == 0 ? 0x1p-127F : std::bit_cast<float>(exponent << 23);
}

/// Codes and scales of the latent; padding behind the scales becomes 0.
inline void encode_latent(const RowFormat& f, const bf16* x, const Place& to) noexcept {
  std::fill_n(to.scales, f.scale_bytes, std::uint8_t{0});
  for (int d = 0; d < f.latent; d += f.tile) {
    const float scale = scale_of(f.scale, x + d, f.tile);
    for (int i = d; i < d + f.tile; ++i) {
      const std::uint32_t code = encode_fp8<E4m3Encoding>(to_f32(x[i]) / scale);
      const bool finite = (x[i].bits & 0x7FFFU) < kBf16Infinity;
      to.row[i] = static_cast<std::uint8_t>(finite ? code : code | 0x7FU);
    }
    write_scale(f.scale, scale, d / f.tile, to.scales);
  }
}

/// Bits of to_bf16, except that every NaN becomes the same one.
inline std::uint16_t bf16_bits(float x) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
  return static_cast<std::uint16_t>(nan ? kBf16Nan : rounded);
}

/// The latent of a row, as bits of bf16. `values` has the value of each e4m3 code.
inline void decode_latent(const RowFormat& f, const float* values, const Place& from,
                          std::uint16_t* out) noexcept {
  constexpr int kStep = 64;  // divides every tile
  for (int d = 0; d < f.latent; d += kStep) {
    const float scale = read_scale(f.scale, from.scales, d / f.tile);
    float looked_up[kStep];
    for (int i = 0; i < kStep; ++i) looked_up[i] = values[from.row[d + i]];
    for (int i = 0; i < kStep; ++i) out[d + i] = bf16_bits(looked_up[i] * scale);
  }
}

}  // namespace attend::coded_row
