// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

/// Formats of cache rows that are bytes: a latent as fp8_e4m3 codes with scales, and rope elements
/// as bf16 bits. A cache is u8 [num_blocks, block_size, row_bytes]; its last dimension says which
/// format it has, so no two formats have rows of the same size. Numbers are little-endian and need
/// no alignment.
///
/// Reading a row always means: latent element = code * scale, the product rounded to float32 and
/// then to bf16 (nearest even), whatever its scale is; rope element = the stored bf16.
namespace attend {

/// What the scale of a tile is, and how it is stored. amax = largest finite magnitude of the tile.
enum class RowScale : std::uint8_t {
  f32,   ///< 4 bytes: max(amax / 448, FLT_MIN) in float32, not rounded further
  ue8m0  ///< 1 byte, the exponent + 127: power of two, max(amax, 1e-4) / 448 rounded up; 255 = NaN
};

/// A format. Elements of a row are the latent and then the rope part.
struct RowFormat {
  std::string_view name;
  int latent;     ///< elements that are codes, from byte 0 on
  int rope;       ///< elements that are bf16
  int tile;       ///< latent elements that share a scale: 64 or 128, divides latent
  int value_dim;  ///< first elements of a row that are its value
  RowScale scale;
  /// True: the scales of a block lie behind its rows. The block is one piece of memory, first the
  /// rest of all its rows, `step` bytes each, then their scales, scale_bytes each.
  bool scales_apart;
  int scales_at;    ///< first byte of the scales in the row, or in what a row has behind the block
  int scale_bytes;  ///< of all scales of a row, padding (zeros) included
  int rope_at;      ///< first byte of the rope elements
  int step;         ///< bytes from a row to the next one where rows adjoin
  int row_bytes;    ///< bytes of a row, scales included
};

/// Elements of a row.
constexpr int row_dim(const RowFormat& f) noexcept { return f.latent + f.rope; }

/// All formats.
std::span<const RowFormat* const> row_formats() noexcept;
/// The format whose rows have so many bytes; null if there is none.
const RowFormat* find_row_format(std::int64_t row_bytes) noexcept;
/// "656 bytes (fp8_ds_mla) or ...": all formats, for errors.
std::string describe_row_formats();

}  // namespace attend
