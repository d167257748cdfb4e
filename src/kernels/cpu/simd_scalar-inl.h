// SPDX-License-Identifier: Apache-2.0
// Vector vocabulary of the scalar level: portable code of four lanes, no intrinsics, for any CPU.

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kTileRows = 4;
  static constexpr int kTileVecs = 2;
  struct F {
    float v[kLanes];
  };
  template <typename Op>
  ATTEND_INLINE static F map(Op op) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = op(i);
    return r;
  }

  ATTEND_INLINE static F zero() { return F{}; }
  ATTEND_INLINE static F set1(float x) {
    return map([&](int) { return x; });
  }
  ATTEND_INLINE static F load(const float* p) {
    return map([&](int i) { return p[i]; });
  }
  ATTEND_INLINE static void store(float* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x.v[i];
  }
  ATTEND_INLINE static F add(F a, F b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  ATTEND_INLINE static F sub(F a, F b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  ATTEND_INLINE static F mul(F a, F b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  ATTEND_INLINE static F div(F a, F b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  /// Two roundings: the baseline has no fused multiply-add.
  ATTEND_INLINE static F fma(F a, F b, F c) {
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  ATTEND_INLINE static F max(F a, F b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  ATTEND_INLINE static F sqrt(F a) {
    return map([&](int i) { return __builtin_sqrtf(a.v[i]); });
  }
  ATTEND_INLINE static F abs(F a) {
    return map([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; });
  }
  ATTEND_INLINE static float reduce_max(F a) {
    const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
    const float y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
    return x > y ? x : y;
  }
  ATTEND_INLINE static float reduce_add(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  ATTEND_INLINE static F iota(float start) {
    return map([&](int i) { return start + static_cast<float>(i); });
  }
  /// x where lo <= lane index < hi, else `other`.
  ATTEND_INLINE static F keep_range(F x, int lo, int hi, F other) {
    return map([&](int i) { return i >= lo && i < hi ? x.v[i] : other.v[i]; });
  }
  /// True if any lane is an infinity or a NaN.
  ATTEND_INLINE static bool any_nonfinite(F x) {
    bool found = false;
    for (int i = 0; i < kLanes; ++i) found |= !(x.v[i] - x.v[i] == 0.0F);
    return found;
  }

  /// 2^x, relative error < 2^-22; 0 below -126, +inf from 128 on, NaN stays NaN.
  ATTEND_INLINE static F exp2(F x) {
    return map([&](int i) {
      const float y = x.v[i];
      if (y < -126.0F) return 0.0F;
      if (!(y < 128.0F)) return y * std::numeric_limits<float>::infinity();
      const float n = __builtin_rintf(y);
      const float f = y - n;
      float p = kExp2Poly[0];
      for (int t = 1; t < kExp2Terms; ++t) p = p * f + kExp2Poly[t];
      const int e = static_cast<int>(n);
      const int half = e / 2;
      const auto power = [](int k) {
        return std::bit_cast<float>(static_cast<std::uint32_t>(k + 127) << 23);
      };
      return p * power(half) * power(e - half);
    });
  }
  template <int N>
  ATTEND_INLINE static void exp2_of_each(F (&x)[N]) {
    for (int v = 0; v < N; ++v) x[v] = exp2(x[v]);
  }

  /// Interleaved columns: x[0], x[2].. and x[1], x[3].. of 8 values; narrow_pairs weaves them
  /// together.
  ATTEND_INLINE static void widen_pairs(const bf16* p, F* even, F* odd) {
    *even = map([&](int i) { return to_f32(p[2 * i]); });
    *odd = map([&](int i) { return to_f32(p[2 * i + 1]); });
  }
  template <typename T>
  ATTEND_INLINE static void narrow_pairs(T* p, F even, F odd) {
    for (int i = 0; i < kLanes; ++i) {
      p[2 * i] = from_f32<T>(even.v[i]);
      p[2 * i + 1] = from_f32<T>(odd.v[i]);
    }
  }

  /// n fp8 codes to the bf16 numbers that they stand for, exactly.
  template <typename Fp8>
  ATTEND_INLINE static void decode(const Fp8* from, int n, bf16* to) {
    for (int i = 0; i < n; ++i) to[i] = attend::to_bf16(to_f32(from[i]));
  }

  /// The same for int8 codes.
  ATTEND_INLINE static void decode(const std::int8_t* from, int n, bf16* to) {
    for (int i = 0; i < n; ++i) to[i] = attend::to_bf16(static_cast<float>(from[i]));
  }

  template <typename T>
  ATTEND_INLINE static F widen(const T* p) {
    return map([&](int i) { return to_f32(p[i]); });
  }
  template <typename T>
  ATTEND_INLINE static void narrow(T* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_f32<T>(x.v[i]);
  }

  /// panel[d * kLd + lane] = rows[lane][d] for kLanes rows of head_dim elements.
  template <int kLd, typename T, typename Beside>
  ATTEND_INLINE static void pack_transposed(const T* const* rows, int head_dim, float* panel,
                                            Beside& beside) {
    beside.template beside_pack<0>();
    for (int d = 0; d < head_dim; ++d)
      for (int i = 0; i < kLanes; ++i) panel[d * kLd + i] = to_f32(rows[i][d]);
  }
};
