// SPDX-License-Identifier: Apache-2.0
// Register tiles of the two matrix products. Each output is ONE chain of fused multiply-adds in
// ascending order (over the head dimension, over the keys): the order is what makes bits equal
// between tiles of different heights. Included inside an ISA namespace.

/// s[r * kPieceSize + j] = sum_d q[r * head_dim + d] * panel[d * kPanelKeys + j], R rows.
template <int R>
ATTEND_INLINE void qk_tile(const float* q, int head_dim, const float* panel, float* s) {
  constexpr int kStep = Simd::kTileVecs * Simd::kLanes;
  for (int j = 0; j < plan::kPanelKeys; j += kStep) {
    Simd::F c[R][Simd::kTileVecs];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < Simd::kTileVecs; ++v) c[r][v] = Simd::zero();
    const float* b = panel + j;
    for (int d = 0; d < head_dim; ++d, b += plan::kPanelKeys) {
      Simd::F key[Simd::kTileVecs];
      for (int v = 0; v < Simd::kTileVecs; ++v) key[v] = Simd::load(b + v * Simd::kLanes);
      for (int r = 0; r < R; ++r) {
        const Simd::F a = Simd::set1(q[r * head_dim + d]);
        for (int v = 0; v < Simd::kTileVecs; ++v) c[r][v] = Simd::fma(a, key[v], c[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < Simd::kTileVecs; ++v)
        Simd::store(s + r * kPieceSize + j + v * Simd::kLanes, c[r][v]);
  }
}

/// Value rows widened and packed: panel[j * kPanelCols + c].
struct PackedValues {
  const float* panel;
  template <int V>
  ATTEND_INLINE Simd::F load(int j) const {
    return Simd::load(panel + j * plan::kPanelCols + V * Simd::kLanes);
  }
};

/// Value rows as they lie in the cache, from column `col` on. On the way the same columns of the
/// next piece's keys are fetched into L2: hardware prefetchers do not follow a block table.
template <typename T>
struct CachedValues {
  const T* const* rows;
  const T* const* ahead;  // null = nothing to prefetch
  KeyRange ahead_range;
  int col;
  template <int V>
  ATTEND_INLINE Simd::F load(int j) const {
    if (ahead != nullptr && V * Simd::kLanes * sizeof(T) % 64 == 0 && j >= ahead_range.lo &&
        j < ahead_range.hi)
      __builtin_prefetch(ahead[j] + col + V * Simd::kLanes, 0, 2);
    return Simd::widen(rows[j] + col + V * Simd::kLanes);
  }
};

#if ATTEND_HALF_VECTOR
/// The last 8 columns of a head size that is no multiple of the vector.
template <typename T>
struct CachedValuesHalf {
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
};

/// acc = acc * keep + (sum over keys [begin, end) of probs * values) * take, R rows, V vectors.
template <int R, int V, typename Values>
ATTEND_INLINE void pv_tile(const PvRows& t, const Values& values, int begin, int end) {
  Simd::F c[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) c[r][v] = Simd::zero();
  for (int j = begin; j < end; ++j) {
    Simd::F b[V];
    load_values<V>(values, j, b);
    for (int r = 0; r < R; ++r) {
      const Simd::F a = Simd::set1(t.probs[r * kPieceSize + j]);
      for (int v = 0; v < V; ++v) c[r][v] = Simd::fma(a, b[v], c[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const Simd::F keep = Simd::set1(t.keep[r]), take = Simd::set1(t.take[r]);
    for (int v = 0; v < V; ++v) {
      float* at = t.acc + r * t.ld + v * Simd::kLanes;
      Simd::store(at, Simd::fma(Simd::load(at), keep, Simd::mul(c[r][v], take)));
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
