// SPDX-License-Identifier: Apache-2.0
// Register tiles of the two matrix products. Each output is ONE chain of fused multiply-adds in
// ascending order (over the head dimension, over the keys): the order is what makes bits equal
// between tiles of different heights. Included inside an ISA namespace.

/// Keys or dimensions of one unrolled step of the tiles' loops.
inline constexpr int kUnroll = 4;

/// The next piece's rows, fetched into L2 a few lines at a time beside all of the arithmetic:
/// hardware prefetchers do not follow a block table, a burst would only fill the line buffers, and
/// a phase without prefetches would leave memory idle. Each phase says how many bytes of the
/// current piece it works on; the shares are the phases' shares of the time, so that a piece's work
/// fetches about one piece.
template <typename K, typename V>
struct PrefetchRows {
  const K* const* keys;    // rows [lo, hi) of kPieceSize of each branch: keys first,
  const V* const* values;  // then values, [lo, value_hi)
  int branches;
  int key_dim, value_dim;  // elements of a row
  int lo, hi, value_hi;
  const void* near;          // 4 KiB that are in the nearest cache: what is fetched at the end
  int row;                   // next row that no run holds yet; values count on behind the keys
  const char* at = nullptr;  // the current run of rows that follow each other in memory
  const char* run_end = nullptr;

  /// Touches each 4 KiB of the rows once, so that later fetches find their addresses translated.
  ATTEND_INLINE void touch_pages() const {
    const int key_step = pages_step(key_dim * static_cast<int>(sizeof(K)));
    const int value_step = pages_step(value_dim * static_cast<int>(sizeof(V)));
    for (int at_branch = 0; at_branch < branches * kPieceSize; at_branch += kPieceSize) {
      for (int j = lo; j < hi; j += key_step) __builtin_prefetch(keys[at_branch + j], 0, 2);
      for (int j = lo; j < value_hi; j += value_step)
        __builtin_prefetch(values[at_branch + j], 0, 2);
    }
  }
  /// Rows that make up about 4 KiB.
  ATTEND_INLINE static int pages_step(int row_bytes) {
    return row_bytes < kPageBytes ? kPageBytes / row_bytes : 1;
  }
  static constexpr int kPageBytes = 4096;
  ATTEND_INLINE void next_run() {
    for (; row < 2 * branches * kPieceSize; row = (row / kPieceSize + 1) * kPieceSize) {
      const int base = row / kPieceSize * kPieceSize;
      if (row < base + lo) row = base + lo;
      if (base < branches * kPieceSize) {
        if (row < base + hi) return follow(keys, key_dim, 0, base + hi);
      } else if (row < base + value_hi) {
        return follow(values, value_dim, branches * kPieceSize, base + value_hi);
      }
    }
    at = static_cast<const char*>(near);
    run_end = at + kPageBytes;
  }
  /// Takes rows of `rows`, of which the first has number `first`, up to number `end`, as long as
  /// they are adjacent.
  template <typename T>
  ATTEND_INLINE void follow(const T* const* rows, int dim, int first, int end) {
    const T* from = rows[row - first];
    const T* after = from + dim;
    const T* const* at_row = rows + (++row - first);
    // Runs are long: a block of rows is taken for adjacent if its ends are.
    constexpr int kRows = 16;
    while (row + kRows <= end && at_row[0] == after &&
           at_row[kRows - 1] == after + (kRows - 1) * dim) {
      row += kRows;
      at_row += kRows;
      after += kRows * dim;
    }
    for (; row < end && *at_row == after; ++row, ++at_row) after += dim;
    at = reinterpret_cast<const char*>(from);
    run_end = reinterpret_cast<const char*>(after);
  }
  /// May run over the run's end: prefetches never fault.
  template <int kLines>
  ATTEND_INLINE void lines() {
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += 64 * kLines;
    if (at >= run_end) next_run();
  }
  template <int kBytes>
  ATTEND_INLINE void beside_pack() {
    lines<kBytes / 64 * 3 / 8>();
  }
  template <int kBytes>
  ATTEND_INLINE void beside_qk() {
    lines<(kBytes / 64 * 3 + 3) / 4>();
  }
  template <int kBytes>
  ATTEND_INLINE void beside_pv() {
    lines<(kBytes / 64 * 3 + 3) / 4>();
  }
  template <int kBytes>
  ATTEND_INLINE void beside_weave() {
    lines<kBytes / 64 / 4>();
  }
  template <int kBytes>
  ATTEND_INLINE void beside_int8_pv() {
    lines<kBytes / 64 / 2>();
  }
};
struct NoPrefetch {
  template <int kBytes>
  ATTEND_INLINE void beside_weave() {}
  template <int kBytes>
  ATTEND_INLINE void beside_int8_pv() {}
  template <int kBytes>
  ATTEND_INLINE void beside_pack() {}
  template <int kBytes>
  ATTEND_INLINE void beside_qk() {}
  template <int kBytes>
  ATTEND_INLINE void beside_pv() {}
};

/// Packed keys: at[d * kPanelKeys + j].
struct KeyPanel {
  const float* at;
  ATTEND_INLINE Simd::F load(int d, int j) const {
    return Simd::load(at + d * plan::kPanelKeys + j);
  }
  ATTEND_INLINE void next_dims() { at += kUnroll * plan::kPanelKeys; }
};
#if ATTEND_BF16_PAIRS
/// Packed bf16 pairs: at[d / 2 * kPanelKeys + j] holds dimensions d and d + 1.
struct PairedKeyPanel {
  const float* at;
  ATTEND_INLINE auto load(int d, int j) const {
    const float* pairs = at + d / 2 * plan::kPanelKeys + j;
    return d % 2 == 0 ? Simd::first_of_pairs(pairs) : Simd::second_of_pairs(pairs);
  }
  ATTEND_INLINE void next_dims() { at += kUnroll / 2 * plan::kPanelKeys; }
};
#endif
#if ATTEND_VBMI
/// Packed pairs of decoded codes: of four dimensions, two panel rows hold the first and third, the
/// second and fourth.
struct CodePairKeyPanel {
  const float* at;
  ATTEND_INLINE auto load(int d, int j) const {
    const float* pairs = at + d % 2 * plan::kPanelKeys + j;
    return d < 2 ? Simd::first_of_pairs(pairs) : Simd::second_of_pairs(pairs);
  }
  ATTEND_INLINE void next_dims() { at += kUnroll / 2 * plan::kPanelKeys; }
};
#endif

/// s[r * kPieceSize + j] = sum_d q[d * kTileRows + r] * key j's dimension d, R rows.
/// The keys had kKeyBytes bytes an element before they were packed.
template <int R, int kKeyBytes, typename Keys, typename Prefetch>
ATTEND_INLINE void qk_tile(const float* q, int head_dim, Keys panel, float* s, Prefetch& prefetch) {
  constexpr int kStep = Simd::kTileVecs * Simd::kLanes;
  for (int j = 0; j < plan::kPanelKeys; j += kStep) {
    Simd::F c[R][Simd::kTileVecs];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < Simd::kTileVecs; ++v) c[r][v] = Simd::zero();
    Keys keys = panel;
    const float* dims = q;
    for (int d = 0; d < head_dim; d += kUnroll, keys.next_dims()) {
      prefetch.template beside_qk<kUnroll * kStep * kKeyBytes>();
#pragma GCC unroll 2
      for (int i = 0; i < kUnroll; ++i, dims += Simd::kTileRows) {
        Simd::F key[Simd::kTileVecs];
        for (int v = 0; v < Simd::kTileVecs; ++v) key[v] = keys.load(i, j + v * Simd::kLanes);
        for (int r = 0; r < R; ++r) {
          const Simd::F a = Simd::set1(dims[r]);
          for (int v = 0; v < Simd::kTileVecs; ++v) c[r][v] = Simd::fma(a, key[v], c[r][v]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < Simd::kTileVecs; ++v)
        Simd::store(s + r * kPieceSize + j + v * Simd::kLanes, c[r][v]);
  }
}

/// Value rows widened and packed: panel[j * kPanelCols + c].
struct PackedValues {
  static constexpr int kBytesPerColumn = 0;  // not in the cache: nothing to prefetch
  const float* panel;
  template <int V>
  ATTEND_INLINE Simd::F load(int j) const {
    return Simd::load(panel + j * plan::kPanelCols + V * Simd::kLanes);
  }
};

/// Value rows as they lie in the cache, from column `col` on.
template <typename T>
struct CachedValues {
  static constexpr int kBytesPerColumn = sizeof(T);
  const T* const* rows;
  int col;
  template <int V>
  ATTEND_INLINE Simd::F load(int j) const {
    return Simd::widen(rows[j] + col + V * Simd::kLanes);
  }
};

/// The same for pairs of vectors with interleaved columns; `col` is a multiple of a pair. kBytes:
/// of a column as it lies in memory.
template <int kBytes>
struct CachedPairs {
  static constexpr int kBytesPerColumn = kBytes;
  const bf16* const* rows;
  int col;
};
template <int V, int kBytes>
ATTEND_INLINE void load_values(const CachedPairs<kBytes>& values, int j, Simd::F* out) {
  for (int v = 0; v < V; v += 2)
    Simd::widen_pairs(values.rows[j] + values.col + v * Simd::kLanes, out + v, out + v + 1);
}

/// Whether accumulators of `rows` query rows have interleaved columns: bf16 values that are
/// multiplied as they lie in the cache. Stored partials have plain columns.
template <typename T>
constexpr bool has_paired_columns(int rows, int head_dim_v) {
  return std::is_same_v<T, bf16> && rows <= Simd::kTileRows && head_dim_v % (2 * Simd::kLanes) == 0;
}

#if ATTEND_HALF_VECTOR
/// The last 8 columns of a head size that is no multiple of the vector.
template <typename T>
struct CachedValuesHalf {
  static constexpr int kBytesPerColumn = 0;
  const T* const* rows;
  int col;
  template <int V>
  ATTEND_INLINE Simd::F load(int j) const {
    return Simd::widen_half(rows[j] + col);
  }
};
#endif

template <int V, typename Values, typename F>
ATTEND_INLINE void load_values(const Values& values, int j, F* out) {
  if constexpr (V > 0) {
    load_values<V - 1>(values, j, out);
    out[V - 1] = values.template load<V - 1>(j);
  }
}

/// Rows of probabilities and where their merged result goes.
struct PvRows {
  const float* probs;  // [R, kPieceSize]
  float* acc;          // first column of the tile, row stride ld
  int ld;
  const float* keep;  // [R]
  const float* take;
  float* parked = nullptr;  // like acc: sums of a tile whose keys come in several calls
  bool first = true;        // the sums start at 0 instead of at parked
  bool last = true;         // they are merged into acc instead of parked again

  /// The same rows from column `col` on.
  ATTEND_INLINE PvRows at(int col) const {
    PvRows t = *this;
    t.acc += col;
    if (parked != nullptr) t.parked += col;
    return t;
  }
};

/// acc = acc * keep + (sum over keys [begin, end) of probs * values) * take, R rows, V vectors;
/// keys of an earlier call come first in the sum. Where keep is 0 the old accumulators are not
/// read: before the first piece they hold anything.
template <int R, int V, typename Values, typename Prefetch>
ATTEND_INLINE void pv_tile(const PvRows& t, const Values& values, int begin, int end,
                           Prefetch& prefetch) {
  Simd::F c[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      c[r][v] = t.first ? Simd::zero() : Simd::load(t.parked + r * t.ld + v * Simd::kLanes);
  const auto add_key = [&](int j) ATTEND_LAMBDA {
    Simd::F b[V];
    load_values<V>(values, j, b);
    for (int r = 0; r < R; ++r) {
      const Simd::F a = Simd::set1(t.probs[r * kPieceSize + j]);
      for (int v = 0; v < V; ++v) c[r][v] = Simd::fma(a, b[v], c[r][v]);
    }
  };
  int j = begin;
  for (; j + kUnroll <= end; j += kUnroll) {
    prefetch.template beside_pv<kUnroll * V * Simd::kLanes * Values::kBytesPerColumn>();
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; ++i) add_key(j + i);
  }
  for (; j < end; ++j) add_key(j);
  if (!t.last) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) Simd::store(t.parked + r * t.ld + v * Simd::kLanes, c[r][v]);
    return;
  }
  for (int r = 0; r < R; ++r) {
    const Simd::F keep = Simd::set1(t.keep[r]), take = Simd::set1(t.take[r]);
    float* at = t.acc + r * t.ld;
    if (t.keep[r] == 0.0F) {
      for (int v = 0; v < V; ++v) Simd::store(at + v * Simd::kLanes, Simd::mul(c[r][v], take));
      continue;
    }
    for (int v = 0; v < V; ++v) {
      const Simd::F old = Simd::load(at + v * Simd::kLanes);
      Simd::store(at + v * Simd::kLanes, Simd::fma(old, keep, Simd::mul(c[r][v], take)));
    }
  }
}

/// Calls f(integral_constant<R>) for the tile height of `rows` (1 .. kTileRows): exact up to 8,
/// else the full tile (buffers are padded to full tiles).
template <int R = 1, typename Fn>
ATTEND_INLINE void with_tile_rows(int rows, const Fn& f) {
  if constexpr (R >= Simd::kTileRows || R > 8) {
    f(std::integral_constant<int, Simd::kTileRows>{});
  } else {
    if (rows == R) {
      f(std::integral_constant<int, R>{});
    } else {
      with_tile_rows<R + 1>(rows, f);
    }
  }
}
