// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "attend/core/float_types.h"
#include "attend/ops/indexer_cache.h"
#include "ops/fp8_encode.h"

namespace attend::ops {

/// The power of two that is not below a normal number.
inline float round_up_to_power_of_two(float x) noexcept {
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(x) + 0x007FFFFFU) & 0xFF800000U);
}

/// How the scale of a row of codes comes about.
struct IndexerScaleRule {
  IndexerScale format = IndexerScale::unrounded;
  float smallest_amax = 0.0F;  ///< > 0
};

/// Codes of the 128 elements of a query or key. Returns its scale: amax / 448, amax being the
/// largest finite magnitude; what is not finite gives the NaN code with its sign.
template <typename T>
float encode_indexer_row(const T* row, const IndexerScaleRule& rule, std::uint8_t* codes) noexcept {
  float amax = 0.0F;
  for (std::int64_t i = 0; i < indexer_cache::kDim; ++i) {
    const float magnitude = std::abs(to_f32(row[i]));
    amax = std::isfinite(magnitude) ? std::max(amax, magnitude) : amax;
  }
  float scale = std::max(amax, rule.smallest_amax) / E4m3Encoding::kLargest;
  if (rule.format == IndexerScale::ue8m0) scale = round_up_to_power_of_two(scale);
  for (std::int64_t i = 0; i < indexer_cache::kDim; ++i) {
    const float x = to_f32(row[i]);
    const std::uint32_t code = encode_fp8<E4m3Encoding>(x / scale);
    codes[i] = static_cast<std::uint8_t>(std::isfinite(x) ? code : (code & 0x80U) | 0x7FU);
  }
  return scale;
}

}  // namespace attend::ops
