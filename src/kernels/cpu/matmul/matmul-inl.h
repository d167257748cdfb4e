// SPDX-License-Identifier: Apache-2.0
// Products by fused multiply-adds in register tiles. Each output is ONE chain over the depth,
// ascending, so that the height of the tile that a row falls into does not matter for its bits.
// Included inside an ISA namespace.

inline constexpr int kMostTileRows = Simd::kTileRows;
/// Columns that the accumulators of a full tile hold.
inline constexpr int kSetColumns = Simd::kTileVecs * Simd::kLanes;
inline constexpr int kSetsPerPanel = kPanelColumns / kSetColumns;
/// Depth that is widened at a time. Rows are a little apart from a power of two, or they would
/// compete for the same lines of the nearest cache.
inline constexpr int kStagedDepth = 512;
inline constexpr int kStagedStride = kStagedDepth + 16;

/// Rows of a tile, widened, and the sums of those whose depth is taken in several steps.
struct Staging {
  alignas(64) float a[kMostTileRows * kStagedStride];
  alignas(64) float sums[kMostTileRows * kMostPanels * kPanelColumns];
};

/// One step over the depth of one tile.
struct TileStep {
  const float* a;  // staged
  int depth;
  bool first, last;
};

/// Weights of a step: w + s * set stride is the first depth of set s.
template <typename T>
ATTEND_INLINE const T* set_weights(const T* panels, std::int64_t panel_elements, int set) {
  constexpr int kPairs = std::is_same_v<T, bf16> ? 2 : 1;
  return panels + set / kSetsPerPanel * panel_elements +
         set % kSetsPerPanel * (kSetColumns * kPairs);
}

/// Depths that weights are fetched ahead of their use.
inline constexpr int kAhead = 12;
/// Fetches the weights of a set, one depth: a panel does not stay in the nearest cache from one
/// tile of rows to the next, and its prefetcher alone falls behind. Prefetches never fault.
template <typename T>
ATTEND_INLINE void fetch_ahead(const T* w) {
  constexpr int kBytes = kSetColumns * static_cast<int>(sizeof(T));
  const char* at = reinterpret_cast<const char*>(w + kAhead * kPanelColumns);
  for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(at + b, 0, 3);
}

/// c[r][v] += a[r][k] * w[k][v] for R rows and kSets sets of columns.
template <int R, int kSets, typename T>
ATTEND_INLINE void accumulate(const TileStep& step, const T* const (&w)[kSets],
                              Simd::F (&c)[R][kSets * Simd::kTileVecs]) {
  constexpr int V = Simd::kTileVecs;
  if constexpr (std::is_same_v<T, bf16>) {
    for (int k = 0; k < step.depth; k += 2) {
#pragma GCC unroll 4
      for (int s = 0; s < kSets; ++s) {
        Simd::F even[V], odd[V];
        for (int v = 0; v < V; ++v)
          Simd::widen_pairs(w[s] + k * kPanelColumns + 2 * v * Simd::kLanes, even + v, odd + v);
        if constexpr (R == kMostTileRows) {
          fetch_ahead<T>(w[s] + k * kPanelColumns);
          fetch_ahead<T>(w[s] + (k + 1) * kPanelColumns);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const Simd::F a0 = Simd::set1(step.a[r * kStagedStride + k]);
          for (int v = 0; v < V; ++v) c[r][s * V + v] = Simd::fma(a0, even[v], c[r][s * V + v]);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const Simd::F a1 = Simd::set1(step.a[r * kStagedStride + k + 1]);
          for (int v = 0; v < V; ++v) c[r][s * V + v] = Simd::fma(a1, odd[v], c[r][s * V + v]);
        }
      }
    }
  } else {
#pragma GCC unroll 2
    for (int k = 0; k < step.depth; ++k) {
#pragma GCC unroll 4
      for (int s = 0; s < kSets; ++s) {
        Simd::F b[V];
        for (int v = 0; v < V; ++v) b[v] = Simd::widen(w[s] + k * kPanelColumns + v * Simd::kLanes);
        if constexpr (R == kMostTileRows) fetch_ahead<T>(w[s] + k * kPanelColumns);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const Simd::F a = Simd::set1(step.a[r * kStagedStride + k]);
          for (int v = 0; v < V; ++v) c[r][s * V + v] = Simd::fma(a, b[v], c[r][s * V + v]);
        }
      }
    }
  }
}

/// Stores a set of a row; `columns` of it are wanted.
template <typename T>
ATTEND_INLINE void store_set(T* to, const Simd::F* c, int columns) {
  if (columns >= kSetColumns) {
    for (int v = 0; v < Simd::kTileVecs; ++v) Simd::narrow(to + v * Simd::kLanes, c[v]);
    return;
  }
  T whole[kSetColumns];
  for (int v = 0; v < Simd::kTileVecs; ++v) Simd::narrow(whole + v * Simd::kLanes, c[v]);
  if (columns > 0) std::memcpy(to, whole, static_cast<std::size_t>(columns) * sizeof(T));
}

/// Where the sums of a tile go.
template <typename T>
struct TileTarget {
  T* out;  // first column of the part, first row of the tile
  std::int64_t out_row;
  int rows;     // of the tile that are wanted
  int columns;  // from `out` on
  float* sums;  // between steps
};

/// One step of sets [set, set + kSets) of a tile of R rows.
template <int R, int kSets, typename T>
ATTEND_INLINE void tile(const TileStep& step, const T* panels, std::int64_t panel_elements, int set,
                        const TileTarget<T>& target) {
  constexpr int V = Simd::kTileVecs, kParked = kMostPanels * kPanelColumns;
  const T* w[kSets];
  for (int s = 0; s < kSets; ++s) w[s] = set_weights(panels, panel_elements, set + s);
  Simd::F c[R][kSets * V];
  float* parked = target.sums + set * kSetColumns;
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kSets * V; ++v)
      c[r][v] = step.first ? Simd::zero() : Simd::load(parked + r * kParked + v * Simd::kLanes);
  accumulate<R, kSets>(step, w, c);
  if (!step.last) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kSets * V; ++v)
        Simd::store(parked + r * kParked + v * Simd::kLanes, c[r][v]);
    return;
  }
  for (int r = 0; r < R; ++r) {
    if (r >= target.rows) break;
    for (int s = 0; s < kSets; ++s) {
      const int column = (set + s) * kSetColumns;
      store_set(target.out + r * target.out_row + column, c[r] + s * V, target.columns - column);
    }
  }
}

/// Sets of columns that a tile of R rows takes at a time: short tiles need more chains to hide what
/// a multiply-add takes.
template <int R>
constexpr int sets_of() {
  return R * 4 <= kMostTileRows ? 4 : R * 2 <= kMostTileRows ? 2 : 1;
}

/// Widens [k, k + depth) of the rows of a tile; rows that are not there become zeros.
template <typename T>
ATTEND_INLINE void stage(const T* a, std::int64_t a_row, int rows, int tile_rows, int depth,
                         float* to) {
  for (int r = 0; r < tile_rows; ++r, to += kStagedStride) {
    if (r >= rows) {
      std::memset(to, 0, static_cast<std::size_t>(depth) * sizeof(float));
      continue;
    }
    const T* from = a + r * a_row;
    int k = 0;
    for (; k + Simd::kLanes <= depth; k += Simd::kLanes) Simd::store(to + k, Simd::widen(from + k));
    for (; k < depth; ++k) to[k] = to_f32(from[k]);
  }
}

/// All columns of the part for up to R rows from `row` on.
template <int R, typename T>
ATTEND_NOINLINE void multiply_rows(const BatchedProduct& p, const ProductPart& part,
                                   std::int64_t row, Staging& staging) {
  constexpr int kSets = sets_of<R>();
  const int sets = (part.panel_end - part.panel_begin) * kSetsPerPanel;
  const int first_column = part.panel_begin * kPanelColumns;
  const T* a = static_cast<const T*>(p.a) + row * p.a_row + part.head * p.a_head;
  const T* panels = static_cast<const T*>(p.weights) +
                    (std::int64_t{part.head} * p.panels() + part.panel_begin) * p.panel_elements();
  TileTarget<T> target;
  target.out = static_cast<T*>(p.out) + row * p.out_row + part.head * p.out_head + first_column;
  target.out_row = p.out_row;
  target.rows = part.row_end - row < R ? static_cast<int>(part.row_end - row) : R;
  target.columns = p.columns - first_column;
  target.sums = staging.sums;
  for (int k = 0; k < p.depth; k += kStagedDepth, panels += kStagedDepth * kPanelColumns) {
    const int depth = p.depth - k < kStagedDepth ? p.depth - k : kStagedDepth;
    stage(a + k, p.a_row, target.rows, R, depth, staging.a);
    const TileStep step{staging.a, depth, k == 0, k + depth == p.depth};
    int set = 0;
    for (; set + kSets <= sets; set += kSets)
      tile<R, kSets>(step, panels, p.panel_elements(), set, target);
    if constexpr (kSets > 1)
      for (; set < sets; ++set) tile<R, 1>(step, panels, p.panel_elements(), set, target);
  }
}

/// The lowest tile that holds all rows, up to the full one.
template <typename T>
void multiply_part(const BatchedProduct& p, const ProductPart& part) {
  Staging staging;
  std::int64_t row = part.row_begin;
  for (; part.row_end - row > kMostTileRows * 2 / 3; row += kMostTileRows)
    multiply_rows<kMostTileRows, T>(p, part, row, staging);
  const std::int64_t rest = part.row_end - row;
  if (rest <= 0) return;
  if (rest == 1) return multiply_rows<1, T>(p, part, row, staging);
  if (rest == 2) return multiply_rows<2, T>(p, part, row, staging);
  if constexpr (kMostTileRows * 2 / 3 > 4)
    if (rest > 4) return multiply_rows<8, T>(p, part, row, staging);
  multiply_rows<4, T>(p, part, row, staging);
}

constexpr MatmulKernel make_matmul_entry(IsaLevel isa) {
  return {.isa = isa,
          .multiply_f32 = &multiply_part<float>,
          .multiply_f16 = &multiply_part<f16>,
          .multiply_bf16 = &multiply_part<bf16>};
}
