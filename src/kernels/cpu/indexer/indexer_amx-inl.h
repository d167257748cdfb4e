// SPDX-License-Identifier: Apache-2.0
// Logits by tile products: e4m3 codes are bf16 numbers, and their products are exact in float32.
// Rows of a tile of sums are heads, columns are keys, so that the sum over heads is one of whole
// registers. A product of a head and a key is a chain of four tile products, whose order inside
// depends on nothing but the dimensions' places. The sum over heads is two chains, ascending: even
// and odd tiles of 16 heads. Included inside an ISA namespace.

inline constexpr int kBlockHeads = 2 * kTileDim;
inline constexpr int kSteps = kIndexerDim / (2 * kTileDim);
static_assert(kIndexerPanel == 2 * kTileDim);
/// Bytes of a panel: 64 pairs of dimensions of 32 keys.
inline constexpr std::int64_t kPanelBytes = std::int64_t{kIndexerPanel} * kIndexerDim * 2;
inline constexpr std::int64_t kPairRowBytes = kIndexerPanel * sizeof(std::uint32_t);

/// What packing of attention does beside; here nothing.
struct NothingBeside {
  template <int kBytes>
  ATTEND_INLINE void beside_pack() {}
};

void pack_keys(const IndexerPack& p) noexcept {
  const CodeTable<fp8_e4m3> table;
  NothingBeside beside;
  for (int j = 0; j < p.count; j += kIndexerPanel) {
    auto* panel = reinterpret_cast<float*>(static_cast<char*>(p.packed) + j * kPanelBytes / 32);
    const auto* rows = reinterpret_cast<const fp8_e4m3* const*>(p.rows + j);
    table.template pack_pairs<kIndexerPanel>(rows, kIndexerDim, panel, beside);
    table.template pack_pairs<kIndexerPanel>(rows + kTileDim, kIndexerDim, panel + kTileDim,
                                             beside);
  }
}

/// The heads as bf16, filled up with zeros, dimensions in the order of packed pairs: 0, 2, 1, 3.
ATTEND_INLINE void stage_queries(const IndexerRow& row) {
  const CodeTable<fp8_e4m3> table;
  auto* to = static_cast<bf16*>(row.scratch);
  for (int h = 0; h < row.heads; ++h, to += kIndexerDim) {
    table.decode(reinterpret_cast<const fp8_e4m3*>(row.q + h * row.q_head), kIndexerDim, to);
    for (int d = 0; d < kIndexerDim; d += 32) {
      const __m512i x = _mm512_loadu_si512(to + d);
      _mm512_storeu_si512(to + d, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(x, 0xd8), 0xd8));
    }
  }
  const auto missing = IndexerKernel::padded_heads(row.heads) - row.heads;
  std::memset(static_cast<void*>(to), 0,
              static_cast<std::size_t>(missing) * kIndexerDim * sizeof(bf16));
}

/// Products of up to 32 heads with the 32 keys of a panel, tile after tile: [head tile][key tile].
struct alignas(64) Products {
  float tile[4][kTileFloats];
};

template <bool kTwoTiles>
ATTEND_INLINE void multiply(const bf16* q, const char* panel, Products& products) {
  constexpr std::int64_t kRow = kIndexerDim * sizeof(bf16);
  clear_tile<0>();
  clear_tile<1>();
  if constexpr (kTwoTiles) {
    clear_tile<2>();
    clear_tile<3>();
  }
#pragma GCC unroll 4
  for (int s = 0; s < kSteps; ++s, q += 2 * kTileDim, panel += kTileDim * kPairRowBytes) {
    load_tile<6>(panel, kPairRowBytes);
    load_tile<4>(q, kRow);
    multiply_bf16<0, 4, 6>();
    load_tile<7>(panel + kTileRowBytes, kPairRowBytes);
    multiply_bf16<1, 4, 7>();
    if constexpr (kTwoTiles) {
      load_tile<5>(q + kTileDim * kIndexerDim, kRow);
      multiply_bf16<2, 5, 6>();
      multiply_bf16<3, 5, 7>();
    }
  }
  store_tile<0>(products.tile[0], kTileRowBytes);
  store_tile<1>(products.tile[1], kTileRowBytes);
  if constexpr (kTwoTiles) {
    store_tile<2>(products.tile[2], kTileRowBytes);
    store_tile<3>(products.tile[3], kTileRowBytes);
  }
}

/// Sums over heads: [head tile][key tile].
struct alignas(64) Sums {
  float of[4][kTileDim];
};

/// sums += weight * max(product, 0) of a block of heads.
ATTEND_INLINE void add_heads(const Products& products, const float* weights, int tiles,
                             Sums& sums) {
  for (int t = 0; t < tiles; ++t) {
    __m512 low = _mm512_load_ps(sums.of[2 * t]), high = _mm512_load_ps(sums.of[2 * t + 1]);
    const float* first = products.tile[2 * t];
    const float* second = products.tile[2 * t + 1];
#pragma GCC unroll 16
    for (int r = 0; r < kTileDim; ++r) {
      const __m512 w = _mm512_set1_ps(weights[t * kTileDim + r]);
      // The maximum takes its second operand if that is NaN.
      const __m512 x = _mm512_max_ps(_mm512_setzero_ps(), _mm512_load_ps(first + r * kTileDim));
      const __m512 y = _mm512_max_ps(_mm512_setzero_ps(), _mm512_load_ps(second + r * kTileDim));
      low = _mm512_fmadd_ps(w, x, low);
      high = _mm512_fmadd_ps(w, y, high);
    }
    _mm512_store_ps(sums.of[2 * t], low);
    _mm512_store_ps(sums.of[2 * t + 1], high);
  }
}

/// A block of heads and a panel of keys.
struct BlockStep {
  int panel = 0, block = 0;
};

/// Multiplies a block and adds up the one before, whose products are ready by then.
class RowPass {
 public:
  ATTEND_INLINE RowPass(const IndexerRow& row, const float* weights)
      : row_(row), weights_(weights), blocks_((row.heads + kBlockHeads - 1) / kBlockHeads) {}

  ATTEND_INLINE void run() {
    BlockStep before;
    int parity = 0;
    bool first = true;
    for (int j = row_.begin / kIndexerPanel; j * kIndexerPanel < row_.end; ++j) {
      for (int b = 0; b < blocks_; ++b, parity ^= 1) {
        multiply_block({j, b}, products_[parity]);
        if (!first) add_block(before, products_[parity ^ 1]);
        before = {j, b};
        first = false;
      }
    }
    if (!first) add_block(before, products_[parity ^ 1]);
  }

 private:
  ATTEND_INLINE int tiles_of(int block) const {
    return row_.heads - block * kBlockHeads > kTileDim ? 2 : 1;
  }
  ATTEND_INLINE void multiply_block(BlockStep at, Products& products) {
    const bf16* q = static_cast<const bf16*>(row_.scratch) + at.block * kBlockHeads * kIndexerDim;
    const char* panel = static_cast<const char*>(row_.packed) + at.panel * kPanelBytes;
    tiles_of(at.block) == 2 ? multiply<true>(q, panel, products)
                            : multiply<false>(q, panel, products);
  }
  ATTEND_INLINE void add_block(BlockStep at, const Products& products) {
    if (at.block == 0) sums_ = Sums{};
    add_heads(products, weights_ + at.block * kBlockHeads, tiles_of(at.block), sums_);
    if (at.block + 1 < blocks_) return;
    for (int t = 0; t < 2; ++t)
      _mm512_store_ps(sums_.of[t],
                      _mm512_add_ps(_mm512_load_ps(sums_.of[t]), _mm512_load_ps(sums_.of[2 + t])));
    store_logits(row_, at.panel * kIndexerPanel, kIndexerPanel, sums_.of[0]);
  }

  const IndexerRow& row_;
  const float* weights_;
  int blocks_;
  Products products_[2];
  Sums sums_;
};

void row_logits(const IndexerRow& row) noexcept {
  stage_queries(row);
  const float* weights = stage_weights(row, kIndexerDim * sizeof(bf16));
  shape_tiles(kTileDim);
  RowPass(row, weights).run();
  release_tiles();
}
