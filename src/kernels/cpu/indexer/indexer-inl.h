// SPDX-License-Identifier: Apache-2.0
// Logits by float32 multiply-adds in register tiles: lanes are keys, rows are heads. A product of
// a head and a key is one chain over the dimensions, ascending, and a logit one chain over the
// heads, so that neither the tile that a head falls into nor the lane of a key matters for its
// bits. Included inside an ISA namespace.

inline constexpr int kSetVecs = Simd::kTileVecs;
inline constexpr int kSetKeys = kSetVecs * Simd::kLanes;
inline constexpr int kMostTileRows = Simd::kTileRows;
static_assert(kIndexerPanel % kSetKeys == 0);

/// What packing of attention does beside; here nothing.
struct NothingBeside {
  template <int kBytes>
  ATTEND_INLINE void beside_pack() {}
};

/// Sets of kSetKeys keys, one after the other: packed[d * kSetKeys + key].
void pack_keys(const IndexerPack& p) noexcept {
  alignas(64) bf16 wide[Simd::kLanes][kIndexerDim];
  const bf16* rows[Simd::kLanes];
  for (int i = 0; i < Simd::kLanes; ++i) rows[i] = wide[i];
  NothingBeside beside;
  const int count = (p.count + kIndexerPanel - 1) / kIndexerPanel * kIndexerPanel;
  for (int j = 0; j < count; j += Simd::kLanes) {
    for (int i = 0; i < Simd::kLanes; ++i)
      Simd::decode(reinterpret_cast<const fp8_e4m3*>(p.rows[j + i]), kIndexerDim, wide[i]);
    float* set = static_cast<float*>(p.packed) + j / kSetKeys * (kSetKeys * kIndexerDim);
    Simd::pack_transposed<kSetKeys>(rows, kIndexerDim, set + j % kSetKeys, beside);
  }
}

/// sum += weight * max(product, 0) of R heads, ascending.
template <int R>
ATTEND_INLINE void add_heads(const float* q, const float* weights, const float* set,
                             Simd::F (&sum)[kSetVecs]) {
  Simd::F c[R][kSetVecs];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kSetVecs; ++v) c[r][v] = Simd::zero();
#pragma GCC unroll 2
  for (int d = 0; d < kIndexerDim; ++d) {
    Simd::F k[kSetVecs];
    for (int v = 0; v < kSetVecs; ++v) k[v] = Simd::load(set + d * kSetKeys + v * Simd::kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Simd::F x = Simd::set1(q[r * kIndexerDim + d]);
      for (int v = 0; v < kSetVecs; ++v) c[r][v] = Simd::fma(x, k[v], c[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const Simd::F w = Simd::set1(weights[r]);
    // The maximum takes its second operand if that is NaN.
    for (int v = 0; v < kSetVecs; ++v)
      sum[v] = Simd::fma(w, Simd::max(Simd::zero(), c[r][v]), sum[v]);
  }
}

/// Sums over all heads for the keys of a set.
ATTEND_NOINLINE void add_all_heads(const float* q, const float* weights, int heads,
                                   const float* set, float* sums) {
  Simd::F sum[kSetVecs];
  for (int v = 0; v < kSetVecs; ++v) sum[v] = Simd::zero();
  int h = 0;
  for (; h + kMostTileRows <= heads; h += kMostTileRows)
    add_heads<kMostTileRows>(q + h * kIndexerDim, weights + h, set, sum);
  if constexpr (kMostTileRows > 4)
    for (; h + 4 <= heads; h += 4) add_heads<4>(q + h * kIndexerDim, weights + h, set, sum);
  for (; h < heads; ++h) add_heads<1>(q + h * kIndexerDim, weights + h, set, sum);
  for (int v = 0; v < kSetVecs; ++v) Simd::store(sums + v * Simd::kLanes, sum[v]);
}

void row_logits(const IndexerRow& row) noexcept {
  auto* q = static_cast<float*>(row.scratch);
  for (int h = 0; h < row.heads; ++h) {
    bf16 wide[kIndexerDim];
    Simd::decode(reinterpret_cast<const fp8_e4m3*>(row.q + h * row.q_head), kIndexerDim, wide);
    for (int d = 0; d < kIndexerDim; d += Simd::kLanes)
      Simd::store(q + h * kIndexerDim + d, Simd::widen(wide + d));
  }
  const float* weights = stage_weights(row, sizeof(float) * kIndexerDim);
  const auto* packed = static_cast<const float*>(row.packed);
  for (int j = row.begin / kSetKeys * kSetKeys; j < row.end; j += kSetKeys) {
    alignas(64) float sums[kSetKeys];
    add_all_heads(q, weights, row.heads, packed + j * kIndexerDim, sums);
    store_logits(row, j, kSetKeys, sums);
  }
}

constexpr IndexerKernel make_indexer_entry(IsaLevel isa) {
  return {.isa = isa,
          .key_bytes = kIndexerDim * sizeof(float),
          .head_bytes = kIndexerDim * sizeof(float),
          .pack = &pack_keys,
          .logits = &row_logits};
}
