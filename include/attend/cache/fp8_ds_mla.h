// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/cache/row_format.h"

/// Layout of a row of KvFormat::fp8_ds_mla, the cache of DeepSeek-shaped latents: 656 bytes hold
/// 512 latent elements as fp8_e4m3 codes, a float32 scale for each 128 of them, and 64 rope
/// elements as bf16 bits. For what a row means see row_format.h.
namespace attend::fp8_ds_mla {

inline constexpr int kLatent = 512;           ///< kv_lora_rank: elements of the latent
inline constexpr int kRope = 64;              ///< qk_rope_head_dim: elements of the rope part
inline constexpr int kDim = kLatent + kRope;  ///< elements of a row
inline constexpr int kTile = 128;             ///< latent elements that share a scale
inline constexpr int kTiles = kLatent / kTile;

inline constexpr int kScalesAt = kLatent;               ///< first byte of the scales
inline constexpr int kRopeAt = kScalesAt + 4 * kTiles;  ///< first byte of the rope elements
inline constexpr int kRowBytes = kRopeAt + 2 * kRope;   ///< bytes of a row
static_assert(kScalesAt == 512 && kRopeAt == 528 && kRowBytes == 656);

inline constexpr RowFormat kFormat{.name = "fp8_ds_mla",
                                   .latent = kLatent,
                                   .rope = kRope,
                                   .tile = kTile,
                                   .value_dim = kLatent,
                                   .scale = RowScale::f32,
                                   .scales_apart = false,
                                   .scales_at = kScalesAt,
                                   .scale_bytes = 4 * kTiles,
                                   .rope_at = kRopeAt,
                                   .step = kRowBytes,
                                   .row_bytes = kRowBytes};

}  // namespace attend::fp8_ds_mla
