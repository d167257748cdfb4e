// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstdint>
#include <cstring>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/core/float_types.h"
#include "ops/fp8_encode.h"

/// Latents of rows in the format fp8_ds_mla; loops that compilers turn into vector code.
namespace attend::fp8_ds_mla {

inline constexpr std::uint16_t kBf16Infinity = 0x7F80U;
inline constexpr std::uint16_t kBf16Nan = 0x7FC0U;

/// max(amax / 448, FLT_MIN) over the finite ones of 128 elements.
inline float scale_of(const bf16* x) noexcept {
  std::uint16_t amax = 0;
  for (int i = 0; i < kTile; ++i) {
    const auto magnitude = static_cast<std::uint16_t>(x[i].bits & 0x7FFFU);
    const auto finite = static_cast<std::uint16_t>(magnitude < kBf16Infinity ? magnitude : 0U);
    amax = std::max(amax, finite);
  }
  return std::max(to_f32(bf16{amax}) / E4m3Encoding::kLargest, FLT_MIN);
}

/// Codes and scales of 512 elements, into the first 528 bytes of a row.
inline void encode_latent(const bf16* x, std::uint8_t* row) noexcept {
  for (int t = 0; t < kTiles; ++t) {
    const bf16* tile = x + t * kTile;
    std::uint8_t* codes = row + t * kTile;
    const float scale = scale_of(tile);
    for (int i = 0; i < kTile; ++i) {
      const std::uint32_t code = encode_fp8<E4m3Encoding>(to_f32(tile[i]) / scale);
      const bool finite = (tile[i].bits & 0x7FFFU) < kBf16Infinity;
      codes[i] = static_cast<std::uint8_t>(finite ? code : code | 0x7FU);
    }
    std::memcpy(row + kScalesAt + 4 * t, &scale, sizeof scale);
  }
}

/// Bits of to_bf16, except that every NaN becomes the same one.
inline std::uint16_t bf16_bits(float x) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
  return static_cast<std::uint16_t>(nan ? kBf16Nan : rounded);
}

/// The 512 latent elements of a row, as bits of bf16. `values` has the value of each e4m3 code.
inline void decode_latent(const float* values, const std::uint8_t* row,
                          std::uint16_t* out) noexcept {
  for (int t = 0; t < kTiles; ++t) {
    float scale;
    std::memcpy(&scale, row + kScalesAt + 4 * t, sizeof scale);
    float looked_up[kTile];
    for (int i = 0; i < kTile; ++i) looked_up[i] = values[row[t * kTile + i]];
    for (int i = 0; i < kTile; ++i) out[t * kTile + i] = bf16_bits(looked_up[i] * scale);
  }
}

}  // namespace attend::fp8_ds_mla
