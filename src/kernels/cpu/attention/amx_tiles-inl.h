// SPDX-License-Identifier: Apache-2.0
// Tile registers of AMX by number. Written as assembly because GCC 12's intrinsics let the compiler
// move stores across tile loads. Included inside an ISA namespace.

/// Rows of a tile, and 32-bit elements of a row.
inline constexpr int kTileDim = 16;
inline constexpr int kTileRowBytes = 64;
inline constexpr int kTileFloats = kTileDim * kTileDim;

/// Shapes of the tile registers, as ldtilecfg reads them.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0;
  std::uint8_t unused[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

/// Tiles 0 to 5 get `rows` rows, 6 and 7 all of them.
ATTEND_INLINE void shape_tiles(int rows) {
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) {
    shapes.row_bytes[t] = kTileRowBytes;
    shapes.rows[t] = static_cast<std::uint8_t>(t < 6 ? rows : kTileDim);
  }
  asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}
ATTEND_INLINE void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

template <int kTile>
ATTEND_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile) : "memory");
}
/// Row i of the tile is at from + i * stride bytes.
template <int kTile>
ATTEND_INLINE void load_tile(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
ATTEND_INLINE void store_tile(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
/// kSum[i][j] += sum_k kA[i][k] * kB[k / 2][j][k % 2] over 32 bf16 products, in float32.
template <int kSum, int kA, int kB>
ATTEND_INLINE void multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB) : "memory");
}
/// kSum[i][j] += sum_k kA[i][k] * kB[k / 4][j][k % 4] over 64 products of signed bytes, exact.
template <int kSum, int kA, int kB>
ATTEND_INLINE void multiply_s8s8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB) : "memory");
}
/// The same with unsigned bytes on the left.
template <int kSum, int kA, int kB>
ATTEND_INLINE void multiply_u8s8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB) : "memory");
}
