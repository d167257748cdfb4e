// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/cache/row_format.h"

/// Layout of the cache rows of DeepSeek-V4 (FlashMLA's MODEL1_FP8Sparse, 584 bytes a token): 448
/// elements without rotation as fp8_e4m3 codes, a power of two for each 64 of them, and 64 rope
/// elements as bf16 bits. All 512 are the key and the value.
///
/// A block of n tokens is one piece of memory: 576 bytes for each token (codes, rope), then 8 for
/// each token (7 exponents, a zero). Blocks may lie apart. For what a row means see row_format.h.
namespace attend::fp8_ds_v4 {

inline constexpr int kLatent = 448;           ///< elements without rotation
inline constexpr int kRope = 64;              ///< elements of the rope part
inline constexpr int kDim = kLatent + kRope;  ///< elements of a row
inline constexpr int kTile = 64;              ///< latent elements that share a scale
inline constexpr int kTiles = kLatent / kTile;

inline constexpr int kRopeAt = kLatent;                     ///< first byte of the rope elements
inline constexpr int kDataBytes = kRopeAt + 2 * kRope;      ///< codes and rope elements of a token
inline constexpr int kScaleBytes = kTiles + 1;              ///< scales of a token, and padding
inline constexpr int kRowBytes = kDataBytes + kScaleBytes;  ///< bytes of a token
static_assert(kDataBytes == 576 && kScaleBytes == 8 && kRowBytes == 584);

inline constexpr RowFormat kFormat{.name = "fp8_ds_v4",
                                   .latent = kLatent,
                                   .rope = kRope,
                                   .tile = kTile,
                                   .value_dim = kDim,
                                   .scale = RowScale::ue8m0,
                                   .scales_apart = true,
                                   .scales_at = 0,
                                   .scale_bytes = kScaleBytes,
                                   .rope_at = kRopeAt,
                                   .step = kDataBytes,
                                   .row_bytes = kRowBytes};

}  // namespace attend::fp8_ds_v4
