// SPDX-License-Identifier: Apache-2.0
// Logits by tile products: e4m3 codes are bf16 numbers, and their products are exact in float32.
// Rows of a tile of sums are keys, columns are heads: keys are decoded in their order, and only
// queries are transposed. A product of a head and a key is a chain of four tile products, whose
// order inside depends on nothing but the dimensions' places. The sum over heads: with t a tile of
// 16 heads and l the place in it, a chain over t for each l, ascending, then l + 8, l + 4, l + 2
// and l + 1. Included inside an ISA namespace.

inline constexpr int kSteps = kIndexerDim / (2 * kTileDim);
static_assert(kSteps == 4 && kIndexerPanel % kTileDim == 0);
inline constexpr std::int64_t kKeyBytes = kIndexerDim * sizeof(bf16);
/// Bytes of 16 packed keys, and of 16 packed heads.
inline constexpr std::int64_t kPackedTile = kTileDim * kKeyBytes;

/// What packing of attention does beside; here nothing.
struct NothingBeside {
  template <int kBytes>
  ATTEND_INLINE void beside_pack() {}
};

/// Keys as bf16. Of 64 dimensions the even ones come first, then the odd ones.
void pack_keys(const IndexerPack& p) noexcept {
  constexpr int kAhead = 32;
  const CodeTable<fp8_e4m3> table;
  const __m512i even = _mm512_set1_epi16(0xff);
  auto* to = static_cast<char*>(p.packed);
  const int count = (p.count + kTileDim - 1) / kTileDim * kTileDim;
  for (int j = 0; j < count; ++j) {
    // The order in which rows are read is not one that the processor foresees.
    if (j + kAhead < count) {
      __builtin_prefetch(p.rows[j + kAhead], 0, 3);
      __builtin_prefetch(p.rows[j + kAhead] + 64, 0, 3);
    }
#pragma GCC unroll 2
    for (int d = 0; d < kIndexerDim; d += 64, to += 128) {
      __m512i l, h;
      table.look_up(_mm512_loadu_si512(p.rows[j] + d), &l, &h);
      // (h << 8) | (l & 0xff), and (h & 0xff00) | (l >> 8)
      _mm512_store_si512(to, _mm512_ternarylogic_epi32(_mm512_slli_epi16(h, 8), l, even, 0xf8));
      _mm512_store_si512(to + 64,
                         _mm512_ternarylogic_epi32(_mm512_srli_epi16(l, 8), even, h, 0xf2));
    }
  }
}

inline constexpr std::uint8_t kNoHead[kIndexerDim] = {};

/// Tiles of 16 heads as pairs of bf16, the last one filled up with zeros. Of 64 dimensions the
/// pairs of even and of odd ones take turns: every second row is a step of packed keys.
ATTEND_INLINE void stage_queries(const IndexerRow& row) {
  const CodeTable<fp8_e4m3> table;
  NothingBeside beside;
  auto* to = static_cast<char*>(row.scratch);
  for (int h = 0; h < row.heads; h += kTileDim, to += kPackedTile) {
    const fp8_e4m3* heads[kTileDim];
    for (int i = 0; i < kTileDim; ++i)
      heads[i] = reinterpret_cast<const fp8_e4m3*>(h + i < row.heads ? row.q + (h + i) * row.q_head
                                                                     : kNoHead);
    table.template pack_pairs<kTileDim>(heads, kIndexerDim, reinterpret_cast<float*>(to), beside);
  }
}

/// Of 16 keys: for each the sums of the heads at the 16 places of a tile.
struct HeadSums {
  __m512 of[kTileDim];

  ATTEND_INLINE void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < kTileDim; ++i) of[i] = _mm512_setzero_ps();
  }
  /// += weights * max(product, 0) of a quarter of the keys.
  template <int kQuarter>
  ATTEND_INLINE void add(const float* products, __m512 weights) {
    constexpr int kKeys = kTileDim / kSteps;
#pragma GCC unroll 4
    for (int i = kQuarter * kKeys; i < (kQuarter + 1) * kKeys; ++i) {
      const __m512 c = _mm512_load_ps(products + i * kTileDim);
      // The maximum takes its second operand if that is NaN.
      of[i] = _mm512_fmadd_ps(weights, _mm512_max_ps(_mm512_setzero_ps(), c), of[i]);
    }
  }
  /// The sums over the places: key i in lane i.
  ATTEND_INLINE __m512 total() const {
    __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512 x = of[i % 4 + i / 4 * 8], y = of[i % 4 + i / 4 * 8 + 4];
      a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                           _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
    return _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
  }
};

/// Stores the logits of keys [first, first + 16) as far as they are wanted, a NaN as store_logits.
ATTEND_INLINE void store_tile_logits(const IndexerRow& row, int first, __m512 sums) {
  const int skip = row.begin > first ? row.begin - first : 0;
  const int left = row.end - first;
  const auto wanted =
      static_cast<__mmask16>((left >= kTileDim ? 0xffffU : (1U << left) - 1U) & (0xffffU << skip));
  const __m512 logits = _mm512_mul_ps(sums, _mm512_maskz_loadu_ps(wanted, row.scales + first));
  const __mmask16 nan = _mm512_cmp_ps_mask(logits, logits, _CMP_UNORD_Q);
  const __m512 quiet = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
  _mm512_mask_storeu_ps(row.logits + first, wanted, _mm512_mask_mov_ps(logits, nan, quiet));
}

/// What two tiles of heads give with 16 keys. Not in RowPass: what a tile is stored next to, the
/// compiler does not keep in registers.
struct alignas(64) Products {
  float tile[2][kTileFloats] = {};
};

/// All keys of a row by the tile. What a tile of heads multiplied with 16 keys gives is stored
/// while the next one is multiplied, and added up beside the one after that: the tiles and the
/// vector units work at the same time only if their instructions are close together.
class RowPass {
 public:
  ATTEND_INLINE RowPass(const IndexerRow& row, const float* weights, Products& products)
      : row_(row),
        queries_(static_cast<const char*>(row.scratch)),
        keys_(static_cast<const char*>(row.packed) + row.begin / kTileDim * kPackedTile),
        weights_(weights),
        products_(products),
        head_tiles_((row.heads + kTileDim - 1) / kTileDim),
        added_key_(row.begin / kTileDim * kTileDim) {}

  ATTEND_INLINE void run() {
    if (row_.begin >= row_.end) return;
    const int key_tiles = (row_.end + kTileDim - 1) / kTileDim - row_.begin / kTileDim;
    HeadSums sums;
    sums.clear();
    std::int64_t left = std::int64_t{key_tiles} * head_tiles_;
    for (; left > 1; left -= 2) {
      step<0, true>(sums);
      step<1, true>(sums);
    }
    if (left == 1) {
      step<0, true>(sums);
      step<1, false>(sums);
      step<0, false>(sums);
    } else {
      step<0, false>(sums);
      step<1, false>(sums);
    }
  }

 private:
  /// Multiplies a tile of heads into tile 6 + kSum, stores the one before, adds the one before it.
  template <int kSum, bool kMultiply>
  ATTEND_INLINE void step(HeadSums& sums) {
    const float* products = products_.tile[kSum];
    const __m512 weights = _mm512_load_ps(weights_ + (added_ < 0 ? 0 : added_) * kTileDim);
    if (added_ == 0) sums.clear();
    if constexpr (kMultiply) {
      if (multiplied_ == 0) load_keys();
      clear_tile<6 + kSum>();
      multiply<kSum, 0>();
    }
    sums.add<0>(products, weights);
    if constexpr (kMultiply) multiply<kSum, 1>();
    store_tile<7 - kSum>(products_.tile[1 - kSum], kTileRowBytes);
    sums.add<1>(products, weights);
    if constexpr (kMultiply) multiply<kSum, 2>();
    sums.add<2>(products, weights);
    if constexpr (kMultiply) {
      multiply<kSum, 3>();
      if (++multiplied_ == head_tiles_) multiplied_ = 0;
    }
    sums.add<3>(products, weights);
    if (++added_ != head_tiles_) return;
    store_tile_logits(row_, added_key_, sums.total());
    added_ = 0;
    added_key_ += kTileDim;
  }
  template <int kSum, int kStep>
  ATTEND_INLINE void multiply() {
    constexpr int kHeads = 4 + kStep % 2, kFetchLines = 4;
    load_tile<kHeads>(queries_ + multiplied_ * kPackedTile + kStep / 2 * (kPackedTile / 2) +
                          kStep % 2 * kTileRowBytes,
                      2 * kTileRowBytes);
    multiply_bf16<6 + kSum, kStep, kHeads>();
    for (int i = 0; i < kFetchLines; ++i, fetch_ += 64) __builtin_prefetch(fetch_, 0, 3);
  }
  ATTEND_INLINE void load_keys() {
    load_tile<0>(keys_, kKeyBytes);
    load_tile<1>(keys_ + kTileRowBytes, kKeyBytes);
    load_tile<2>(keys_ + 2 * kTileRowBytes, kKeyBytes);
    load_tile<3>(keys_ + 3 * kTileRowBytes, kKeyBytes);
    keys_ += kPackedTile;
    fetch_ = keys_;
  }

  const IndexerRow& row_;
  const char* queries_;
  const char* keys_;  // that come next
  const float* weights_;
  Products& products_;
  int head_tiles_;
  int multiplied_ = 0, added_ = -2;  // tiles of heads
  int added_key_;
  const char* fetch_ = nullptr;
};

void row_logits(const IndexerRow& row) noexcept {
  stage_queries(row);
  const float* weights = stage_weights(row, kIndexerDim * sizeof(bf16));
  shape_tiles(kTileDim);
  Products products;
  RowPass(row, weights, products).run();
  release_tiles();
}
