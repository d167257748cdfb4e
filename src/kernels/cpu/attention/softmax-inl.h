// SPDX-License-Identifier: Apache-2.0
// Logits of one row and one piece to probabilities. Included inside an ISA namespace.

/// tanh with an absolute error below 2^-21.
ATTEND_INLINE Simd::F tanh(Simd::F x) {
  // 1 - 2 / (e^2x + 1); beyond +-20 the result is +-1 in float32, and 2^x would overflow.
  const Simd::F minus = Simd::set1(-20.0F);
  Simd::F y = Simd::max(minus, x);
  y = Simd::sub(Simd::zero(), Simd::max(minus, Simd::sub(Simd::zero(), y)));
  const Simd::F e = Simd::exp2(Simd::mul(y, Simd::set1(2.0F * kLog2e)));
  return Simd::sub(Simd::set1(1.0F), Simd::div(Simd::set1(2.0F), Simd::add(e, Simd::set1(1.0F))));
}

/// Per-row terms of a logit.
struct LogitTerms {
  float factor;        // of the logit as it comes, where the queries do not have it
  float softcap_log2;  // softcap * log2(e); 0 = off
  float alibi_log2;    // slope * log2(e); 0 = off
  float position;      // absolute position of the query minus that of the piece's first key
  bool alibi_sqrt;     // bias by the square root of the distance to earlier keys
};

template <bool Extra>
ATTEND_INLINE Simd::F finish_logit(Simd::F x, int j, const LogitTerms& t) {
  if constexpr (Extra) {
    if (t.softcap_log2 > 0.0F) x = Simd::mul(tanh(x), Simd::set1(t.softcap_log2));
    if (t.alibi_log2 != 0.0F) {
      Simd::F distance = Simd::sub(Simd::set1(t.position), Simd::iota(static_cast<float>(j)));
      distance = t.alibi_sqrt ? Simd::sqrt(Simd::max(distance, Simd::zero())) : Simd::abs(distance);
      x = Simd::fma(Simd::set1(-t.alibi_log2), distance, x);
    }
  }
  return x;
}

/// s *= factors over `span`, whose bounds are multiples of 16.
ATTEND_INLINE void multiply_by(float* s, const float* factors, KeyRange span) {
  for (int j = span.lo; j < span.hi; j += Simd::kLanes)
    Simd::store(s + j, Simd::mul(Simd::load(s + j), Simd::load(factors + j)));
}
/// The same for the visible keys; s becomes 0 elsewhere.
ATTEND_INLINE void multiply_visible_by(float* s, const float* factors, KeyRange span,
                                       KeyRange visible) {
  for (int j = span.lo; j < span.hi; j += Simd::kLanes) {
    const Simd::F x = Simd::mul(Simd::load(s + j), Simd::load(factors + j));
    Simd::store(s + j, Simd::keep_range(x, visible.lo - j, visible.hi - j, Simd::zero()));
  }
}

/// Maximum (-inf if nothing is visible) and sum of one row of a piece.
struct RowSums {
  float max, sum;
};

/// Turns s[span] (bounds multiples of 16, relative to the piece) into exp2(logit - max) with 0
/// outside `visible`. The sum runs over 16 virtual lanes in ascending blocks and then a fixed tree:
/// it does not depend on the span.
template <bool Extra>
ATTEND_INLINE RowSums softmax_row(float* s, KeyRange span, KeyRange visible, const LogitTerms& t) {
  const int begin = span.lo, end = span.hi, lo = visible.lo, hi = visible.hi;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr int kLanes = Simd::kLanes;
  const Simd::F minus_inf = Simd::set1(-kInf);
  Simd::F max_lanes = minus_inf;
  for (int j = begin; j < end; j += kLanes) {
    Simd::F x = finish_logit<Extra>(Simd::load(s + j), j, t);
    if (j < lo || j + kLanes > hi) x = Simd::keep_range(x, lo - j, hi - j, minus_inf);
    if (Extra || j < lo || j + kLanes > hi) Simd::store(s + j, x);
    max_lanes = Simd::max(max_lanes, x);
  }
  const float m = Simd::reduce_max(max_lanes);
  if (m == -kInf) {
    for (int j = begin; j < end; j += kLanes) Simd::store(s + j, Simd::zero());
    return {m, 0.0F};
  }
  constexpr int kVecs = 16 / kLanes;
  const Simd::F shift = Simd::set1(m);
  Simd::F sum[kVecs];
  for (int v = 0; v < kVecs; ++v) sum[v] = Simd::zero();
  for (int j = begin; j < end; j += 16) {
    for (int v = 0; v < kVecs; ++v) {
      float* at = s + j + v * kLanes;
      const Simd::F e = Simd::exp2(Simd::sub(Simd::load(at), shift));
      Simd::store(at, e);
      sum[v] = Simd::add(sum[v], e);
    }
  }
  for (int width = kVecs / 2; width > 0; width /= 2)
    for (int v = 0; v < width; ++v) sum[v] = Simd::add(sum[v], sum[v + width]);
  return {m, Simd::reduce_add(sum[0])};
}

/// Merges pieces' (m, l) into running ones, ascending, and gives the factors for the accumulators.
/// A piece without visible keys leaves the state untouched. Arrays are padded to full vectors.
ATTEND_INLINE void merge_rows(int rows, float* m, float* l, const float* piece_m,
                              const float* piece_l, float* keep, float* take) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int r = 0; r < rows; ++r) {
    const float top = piece_m[r] == -kInf ? m[r] : (m[r] > piece_m[r] ? m[r] : piece_m[r]);
    // Differences of -inf and -inf would be NaN: an empty side gets weight 0 through -200.
    keep[r] = m[r] == -kInf ? -200.0F : m[r] - top;
    take[r] = piece_m[r] == -kInf ? -200.0F : piece_m[r] - top;
    m[r] = top;
  }
  for (int r = 0; r < rows; r += Simd::kLanes) {
    const Simd::F a = Simd::exp2(Simd::load(keep + r));
    const Simd::F b = Simd::exp2(Simd::load(take + r));
    Simd::store(keep + r, a);
    Simd::store(take + r, b);
    Simd::store(l + r, Simd::fma(Simd::load(l + r), a, Simd::mul(Simd::load(piece_l + r), b)));
  }
}
