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
    // The order in which rows are read is not one that the processor foresees.
    for (int i = j + kIndexerPanel; i < p.count && i < j + 2 * kIndexerPanel; ++i) {
      __builtin_prefetch(p.rows[i], 0, 3);
      __builtin_prefetch(p.rows[i] + 64, 0, 3);
    }
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

/// Sums over heads: [head tile][key tile].
struct alignas(64) Sums {
  float of[4][kTileDim];
};

/// Products that are to be added up.
struct Finished {
  const Products* products = nullptr;  // null = none
  const float* weights = nullptr;      // of the first head
  int tiles = 0;
};

/// sums += weight * max(product, 0) of a quarter of a block: 8 heads.
ATTEND_INLINE void add_quarter(const Finished& f, int quarter, Sums& sums) {
  const int t = quarter / 2, begin = quarter % 2 * (kTileDim / 2);
  if (t >= f.tiles) return;
  __m512 low = _mm512_load_ps(sums.of[2 * t]), high = _mm512_load_ps(sums.of[2 * t + 1]);
  const float* weights = f.weights + t * kTileDim + begin;
  const float* first = f.products->tile[2 * t] + begin * kTileDim;
  const float* second = f.products->tile[2 * t + 1] + begin * kTileDim;
#pragma GCC unroll 8
  for (int r = 0; r < kTileDim / 2; ++r) {
    const __m512 w = _mm512_set1_ps(weights[r]);
    // The maximum takes its second operand if that is NaN.
    const __m512 x = _mm512_max_ps(_mm512_setzero_ps(), _mm512_load_ps(first + r * kTileDim));
    const __m512 y = _mm512_max_ps(_mm512_setzero_ps(), _mm512_load_ps(second + r * kTileDim));
    low = _mm512_fmadd_ps(w, x, low);
    high = _mm512_fmadd_ps(w, y, high);
  }
  _mm512_store_ps(sums.of[2 * t], low);
  _mm512_store_ps(sums.of[2 * t + 1], high);
}

/// Multiplies a block and, between its steps, adds up the one before: the tiles and the vector
/// units work at the same time only if their instructions are close together.
template <bool kTwoTiles>
ATTEND_INLINE void multiply(const bf16* q, const char* panel, Products& products, const char* fetch,
                            const Finished& before, Sums& sums) {
  constexpr int kFetchLines = 16;
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
    for (int i = 0; i < kFetchLines; ++i)
      __builtin_prefetch(fetch + 64 * (s * kFetchLines + i), 0, 3);
    if (before.products != nullptr) add_quarter(before, s, sums);
  }
  store_tile<0>(products.tile[0], kTileRowBytes);
  store_tile<1>(products.tile[1], kTileRowBytes);
  if constexpr (kTwoTiles) {
    store_tile<2>(products.tile[2], kTileRowBytes);
    store_tile<3>(products.tile[3], kTileRowBytes);
  }
}

/// All panels of a row, block by block of heads.
class RowPass {
 public:
  ATTEND_INLINE RowPass(const IndexerRow& row, const float* weights)
      : row_(row), weights_(weights), blocks_((row.heads + kBlockHeads - 1) / kBlockHeads) {}

  ATTEND_INLINE void run() {
    if (row_.begin >= row_.end) return;
    int parity = 0;
    for (int j = row_.begin / kIndexerPanel; j * kIndexerPanel < row_.end; ++j) {
      for (int b = 0; b < blocks_; ++b, parity ^= 1) {
        multiply_block(j, b, products_[parity]);
        close_block();
        panel_ = j;
        block_ = b;
        before_ = {&products_[parity], weights_ + b * kBlockHeads, tiles_of(b)};
      }
    }
    for (int quarter = 0; quarter < kSteps; ++quarter) add_quarter(before_, quarter, sums_);
    close_block();
  }

 private:
  ATTEND_INLINE int tiles_of(int block) const {
    return row_.heads - block * kBlockHeads > kTileDim ? 2 : 1;
  }
  ATTEND_INLINE void multiply_block(int panel, int block, Products& products) {
    const bf16* q = static_cast<const bf16*>(row_.scratch) + block * kBlockHeads * kIndexerDim;
    const char* packed = static_cast<const char*>(row_.packed) + panel * kPanelBytes;
    const char* fetch = packed + kPanelBytes + block % 2 * (kPanelBytes / 2);
    tiles_of(block) == 2 ? multiply<true>(q, packed, products, fetch, before_, sums_)
                         : multiply<false>(q, packed, products, fetch, before_, sums_);
  }
  /// The block before is added up: stores the logits if it was a panel's last one.
  ATTEND_INLINE void close_block() {
    if (block_ + 1 != blocks_) return;
    for (int t = 0; t < 2; ++t)
      _mm512_store_ps(sums_.of[t],
                      _mm512_add_ps(_mm512_load_ps(sums_.of[t]), _mm512_load_ps(sums_.of[2 + t])));
    store_logits(row_, panel_ * kIndexerPanel, kIndexerPanel, sums_.of[0]);
    sums_ = Sums{};
  }

  const IndexerRow& row_;
  const float* weights_;
  int blocks_;
  int panel_ = 0, block_ = -2;  // the block before; none yet
  Finished before_;
  Products products_[2];
  Sums sums_{};
};

void row_logits(const IndexerRow& row) noexcept {
  stage_queries(row);
  const float* weights = stage_weights(row, kIndexerDim * sizeof(bf16));
  shape_tiles(kTileDim);
  RowPass(row, weights).run();
  release_tiles();
}
