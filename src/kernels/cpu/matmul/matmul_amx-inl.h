// SPDX-License-Identifier: Apache-2.0
// Products of bf16 numbers in tiles. A tile product adds 32 terms in an order that depends on
// nothing but their place, and each output is one chain of such products, ascending, so that the
// rows that share a tile do not matter. Included inside an ISA namespace.

static_assert(kDepthStep == 2 * kTileDim && kPanelColumns == 2 * kTileDim);

inline constexpr int kBlockRows = 2 * kTileDim;
inline constexpr std::int64_t kPanelRowBytes = std::int64_t{kPanelColumns} * 2 * sizeof(bf16);

/// A block of rows of one head: up to two tiles of rows.
struct RowBlock {
  const bf16* a;
  std::int64_t a_row;  // elements
  const bf16* rest;    // the last depth % kDepthStep of each row, filled up with zeros; null = none
};

/// Tiles 0 to 3 += rows times a panel, over one step of the depth.
template <int kRowTiles>
ATTEND_INLINE void multiply_step(const bf16* a, std::int64_t a_row_bytes, const bf16* w) {
  load_tile<6>(w, kPanelRowBytes);
  load_tile<7>(w + kPanelColumns, kPanelRowBytes);
  load_tile<4>(a, a_row_bytes);
  multiply_bf16<0, 4, 6>();
  multiply_bf16<1, 4, 7>();
  if constexpr (kRowTiles == 2) {
    load_tile<5>(reinterpret_cast<const char*>(a) + kTileDim * a_row_bytes, a_row_bytes);
    multiply_bf16<2, 5, 6>();
    multiply_bf16<3, 5, 7>();
  }
}

/// sums[r][n] = products of the rows of a block with a panel.
template <int kRowTiles>
ATTEND_INLINE void multiply_block(const RowBlock& block, const bf16* w, int depth, float* sums) {
  clear_tile<0>();
  clear_tile<1>();
  if constexpr (kRowTiles == 2) {
    clear_tile<2>();
    clear_tile<3>();
  }
  const auto a_row_bytes = static_cast<std::int64_t>(block.a_row * sizeof(bf16));
  int k = 0;
  for (; k + kDepthStep <= depth; k += kDepthStep, w += kDepthStep * kPanelColumns)
    multiply_step<kRowTiles>(block.a + k, a_row_bytes, w);
  if (k < depth) multiply_step<kRowTiles>(block.rest, kDepthStep * sizeof(bf16), w);
  constexpr std::int64_t kRowBytes = kPanelColumns * sizeof(float);
  store_tile<0>(sums, kRowBytes);
  store_tile<1>(sums + kTileDim, kRowBytes);
  if constexpr (kRowTiles == 2) {
    store_tile<2>(sums + kTileDim * kPanelColumns, kRowBytes);
    store_tile<3>(sums + kTileDim * kPanelColumns + kTileDim, kRowBytes);
  }
}

/// Rounds rows of sums to bf16. @param columns of the panel that are wanted
ATTEND_INLINE void store_rows(const float* sums, int rows, int columns, bf16* out,
                              std::int64_t out_row) {
  const __mmask32 wanted =
      columns >= kPanelColumns ? ~__mmask32{0} : static_cast<__mmask32>((1U << columns) - 1U);
  for (int r = 0; r < rows; ++r, sums += kPanelColumns, out += out_row) {
    const __m512bh both =
        _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + kTileDim), _mm512_load_ps(sums));
    __m512i bits;
    std::memcpy(&bits, &both, sizeof bits);
    _mm512_mask_storeu_epi16(out, wanted, bits);
  }
}

/// The last columns of rows, of a depth that is no multiple of kDepthStep.
ATTEND_INLINE void stage_rest(const bf16* a, std::int64_t a_row, int rows, int depth, bf16* to) {
  const int rest = depth % kDepthStep;
  for (int r = 0; r < rows; ++r, to += kDepthStep) {
    for (int k = rest; k < kDepthStep; ++k) to[k] = bf16{};
    std::memcpy(to, a + r * a_row + depth - rest, static_cast<std::size_t>(rest) * sizeof(bf16));
  }
}

/// All columns of the part for a block of rows, one or two tiles of the rows that shape_tiles() was
/// told.
template <int kRowTiles>
ATTEND_NOINLINE void multiply_rows(const BatchedProduct& p, const ProductPart& part,
                                   std::int64_t row, int rows) {
  alignas(64) float sums[kBlockRows * kPanelColumns];
  alignas(64) bf16 rest[kBlockRows * kDepthStep];
  RowBlock block;
  block.a = static_cast<const bf16*>(p.a) + row * p.a_row + part.head * p.a_head;
  block.a_row = p.a_row;
  block.rest = rest;
  if (p.depth % kDepthStep != 0) stage_rest(block.a, p.a_row, rows, p.depth, rest);
  const std::int64_t panel_elements = p.panel_elements();
  const bf16* w = static_cast<const bf16*>(p.weights) +
                  (std::int64_t{part.head} * p.panels() + part.panel_begin) * panel_elements;
  bf16* out = static_cast<bf16*>(p.out) + row * p.out_row + part.head * p.out_head;
  for (int panel = part.panel_begin; panel < part.panel_end; ++panel, w += panel_elements) {
    multiply_block<kRowTiles>(block, w, p.depth, sums);
    const int column = panel * kPanelColumns;
    store_rows(sums, rows, p.columns - column, out + column, p.out_row);
  }
}

void multiply_part(const BatchedProduct& p, const ProductPart& part) {
  std::int64_t row = part.row_begin;
  const auto left = [&] { return part.row_end - row; };
  if (left() >= kTileDim) shape_tiles(kTileDim);
  for (; left() >= kBlockRows; row += kBlockRows) multiply_rows<2>(p, part, row, kBlockRows);
  if (left() >= kTileDim) {
    multiply_rows<1>(p, part, row, kTileDim);
    row += kTileDim;
  }
  if (left() > 0) {
    const auto rows = static_cast<int>(left());
    shape_tiles(rows);
    multiply_rows<1>(p, part, row, rows);
  }
  release_tiles();
}
