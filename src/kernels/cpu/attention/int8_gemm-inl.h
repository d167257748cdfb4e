// SPDX-License-Identifier: Apache-2.0
// Register tiles of the two integer products. Sums of 32 bits are exact, so their order is free.
// Included inside an ISA namespace.

/// Dimensions or keys of one unrolled step: this many 4-byte groups.
inline constexpr int kDotUnroll = 4;

/// The weight that stands for 1 where weights are rounded to integers.
inline constexpr float kWeightLevels = 127.0F;

/// Rows of int8 queries.
struct Int8Queries {
  const std::int8_t* codes;    // [R, head_dim]
  const std::int32_t* starts;  // [R] what takes the keys' bias away
  const float* factors;        // [R] logit = sum * factor * scale of the key + offset
  const float* offsets;        // [R]
};

/// s[r * kPieceSize + j] = logit of row r and key j of a panel; `key_scales` is the panel's first.
template <int R, typename Prefetch>
ATTEND_INLINE void int8_qk_tile(const Int8Queries& q, int head_dim, const std::uint8_t* panel,
                                const float* key_scales, float* s, Prefetch& prefetch) {
  constexpr int kVecs = Simd::kTileVecs;
  constexpr int kStep = kVecs * Simd::kLanes;
  for (int j = 0; j < plan::kPanelKeys; j += kStep) {
    Dot::I c[R][kVecs];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVecs; ++v) c[r][v] = Dot::set1(q.starts[r]);
    const std::uint8_t* keys = panel + j * kDotBytes;
    const auto add_dims = [&](int d) ATTEND_LAMBDA {
      Dot::I key[kVecs];
      for (int v = 0; v < kVecs; ++v)
        key[v] = Dot::load(keys + (d * plan::kPanelKeys + v * Simd::kLanes * kDotBytes));
      for (int r = 0; r < R; ++r) {
        const Dot::I a = Dot::broadcast(q.codes + (r * head_dim + d));
        for (int v = 0; v < kVecs; ++v) c[r][v] = Dot::dot(c[r][v], key[v], a);
      }
    };
    constexpr int kDims = kDotUnroll * kDotBytes;
    int d = 0;
    for (; d + kDims <= head_dim; d += kDims) {
      prefetch.template beside_qk<kDims * kStep>();
      for (int i = 0; i < kDotUnroll; ++i) add_dims(d + i * kDotBytes);
    }
    for (; d < head_dim; d += kDotBytes) add_dims(d);
    for (int r = 0; r < R; ++r) {
      const Simd::F factor = Simd::set1(q.factors[r]), offset = Simd::set1(q.offsets[r]);
      for (int v = 0; v < kVecs; ++v) {
        const int at = j + v * Simd::kLanes;
        const Simd::F scaled = Simd::mul(Dot::to_float(c[r][v]), factor);
        Simd::store(s + r * kPieceSize + at,
                    Simd::fma(scaled, Simd::load(key_scales + at), offset));
      }
    }
  }
}

/// Values of a piece, packed: at[j / 4][column][4].
struct PackedCodes {
  const std::int8_t* at;
  int columns;  // of a row of groups
};

/// acc = acc * keep + (sum over `keys` of weights * values) / kWeightLevels * take, R
/// rows, V vectors of columns from t.acc on. The bounds are multiples of 4; weights of masked keys
/// are 0.
template <int R, int V, typename Prefetch>
ATTEND_INLINE void int8_pv_tile(const std::uint8_t* weights, const PvRows& t,
                                const PackedCodes& values, KeyRange keys, Prefetch& prefetch) {
  Dot::I c[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) c[r][v] = Dot::zero();
  for (int j = keys.lo; j < keys.hi; j += kDotBytes) {
    prefetch.template beside_int8_pv<kDotBytes * V * Simd::kLanes>();
    const std::int8_t* group = values.at + std::int64_t{j} * values.columns;
    Dot::I b[V];
    for (int v = 0; v < V; ++v) b[v] = Dot::load(group + v * Simd::kLanes * kDotBytes);
    for (int r = 0; r < R; ++r) {
      const Dot::I a = Dot::broadcast(weights + r * kPieceSize + j);
      for (int v = 0; v < V; ++v) c[r][v] = Dot::dot(c[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const Simd::F keep = Simd::set1(t.keep[r]);
    const Simd::F take = Simd::set1(t.take[r]);
    const Simd::F unit = Simd::set1(1.0F / kWeightLevels);
    float* at = t.acc + r * t.ld;
    for (int v = 0; v < V; ++v) {
      // Two products, so that a stored partial, whose take is 1, merges to the same bits.
      const Simd::F part = Simd::mul(Simd::mul(Dot::to_float(c[r][v]), unit), take);
      const bool first = t.keep[r] == 0.0F;
      float* to = at + v * Simd::kLanes;
      Simd::store(to, first ? part : Simd::fma(Simd::load(to), keep, part));
    }
  }
}

/// Rounds weights s[span] of one row to bytes and returns their sum, in units of 1. Weights outside
/// of the visible keys are 0. All partial sums are integers: exact in any order.
ATTEND_INLINE float round_weights(const float* s, KeyRange span, std::uint8_t* to) {
  const Simd::F levels = Simd::set1(kWeightLevels);
  Simd::F sum = Simd::zero();
  for (int j = span.lo; j < span.hi; j += Simd::kLanes)
    sum = Simd::add(sum, Dot::store_rounded(to + j, Simd::mul(Simd::load(s + j), levels)));
  return Simd::reduce_add(sum) * (1.0F / kWeightLevels);
}
