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

/// Whether all keys of `span` are visible.
ATTEND_INLINE bool sees_all(KeyRange span, KeyRange visible) {
  return span.lo >= visible.lo && span.hi <= visible.hi;
}

/// Maximum of s[span], bounds multiples of 16. Several maxima, or each step would wait for the one
/// before.
ATTEND_INLINE float max_of(const float* s, KeyRange span) {
  constexpr int kVecs = 4, kStep = kVecs * Simd::kLanes;
  Simd::F top[kVecs];
  for (int v = 0; v < kVecs; ++v) top[v] = Simd::set1(-std::numeric_limits<float>::infinity());
  int j = span.lo;
  for (; j + kStep <= span.hi; j += kStep)
    for (int v = 0; v < kVecs; ++v)
      top[v] = Simd::max(top[v], Simd::load(s + j + v * Simd::kLanes));
  for (; j < span.hi; j += Simd::kLanes) top[0] = Simd::max(top[0], Simd::load(s + j));
  return Simd::reduce_max(Simd::max(Simd::max(top[0], top[1]), Simd::max(top[2], top[3])));
}

/// Finishes the logits s[span] (bounds multiples of 16, relative to the piece), -inf outside of
/// `visible`, and returns their maximum. kFactor: they want multiplying by t.factor first.
template <bool kExtra, bool kFactor>
ATTEND_INLINE float finish_logits(float* s, KeyRange span, KeyRange visible, const LogitTerms& t) {
  if (!kExtra && !kFactor && sees_all(span, visible)) return max_of(s, span);
  const Simd::F minus_inf = Simd::set1(-std::numeric_limits<float>::infinity());
  Simd::F top = minus_inf;
  for (int j = span.lo; j < span.hi; j += Simd::kLanes) {
    Simd::F x = Simd::load(s + j);
    if constexpr (kFactor) x = Simd::mul(x, Simd::set1(t.factor));
    x = finish_logit<kExtra>(x, j, t);
    const bool cut = j < visible.lo || j + Simd::kLanes > visible.hi;
    if (cut) x = Simd::keep_range(x, visible.lo - j, visible.hi - j, minus_inf);
    if (cut || kExtra || kFactor) Simd::store(s + j, x);
    top = Simd::max(top, x);
  }
  return Simd::reduce_max(top);
}

/// Rows that are weighed together, so that none waits for its own sums.
inline constexpr int kRowsAtOnce = Simd::kLanes == 16 ? 4 : 2;

/// What is taken from a row's logits: their maximum, or 0 where nothing is visible.
ATTEND_INLINE Simd::F shift_of(float max) {
  return Simd::set1(max == -std::numeric_limits<float>::infinity() ? 0.0F : max);
}

/// Turns the logits of N rows, span (bounds multiples of 16), into exp2(logit - max). The sums run
/// over 16 virtual lanes in ascending blocks and then a fixed tree: they depend neither on the span
/// nor on the rows beside.
template <int N>
ATTEND_INLINE void weigh_rows(float* const* rows, const float* max, KeyRange span, float* sums) {
  constexpr int kVecs = 16 / Simd::kLanes;
  Simd::F shift[N], sum[N][kVecs];
  for (int i = 0; i < N; ++i) {
    shift[i] = shift_of(max[i]);
    for (int v = 0; v < kVecs; ++v) sum[i][v] = Simd::zero();
  }
  for (int j = span.lo; j < span.hi; j += 16) {
    for (int v = 0; v < kVecs; ++v) {
      const int at = j + v * Simd::kLanes;
      Simd::F e[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) e[i] = Simd::sub(Simd::load(rows[i] + at), shift[i]);
      Simd::exp2_of_each(e);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        Simd::store(rows[i] + at, e[i]);
        sum[i][v] = Simd::add(sum[i][v], e[i]);
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int width = kVecs / 2; width > 0; width /= 2)
      for (int v = 0; v < width; ++v) sum[i][v] = Simd::add(sum[i][v], sum[i][v + width]);
    sums[i] = Simd::reduce_add(sum[i][0]);
  }
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
