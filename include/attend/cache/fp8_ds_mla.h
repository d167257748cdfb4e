// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Layout of a row of KvFormat::fp8_ds_mla, the cache of DeepSeek-shaped latents: 656 bytes hold
/// 512 latent elements as fp8_e4m3 codes, a float32 scale for each 128 of them, and 64 rope
/// elements as bf16 bits. Numbers are little-endian and need no alignment.
///
/// Reading a row always means: latent element = code * scale, the product rounded to float32 and
/// then to bf16 (nearest even), whatever its scale is; rope element = the stored bf16.
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

}  // namespace attend::fp8_ds_mla
