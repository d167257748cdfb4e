// SPDX-License-Identifier: Apache-2.0
// Vector vocabulary of the avx512 level. Included inside an ISA region and namespace, after
// <immintrin.h> and attend/core/float_types.h.

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 12;  // 12 x 2 accumulators of the 32 registers
  static constexpr int kTileVecs = 2;
  using F = __m512;

  ATTEND_INLINE static F zero() { return _mm512_setzero_ps(); }
  ATTEND_INLINE static F set1(float x) { return _mm512_set1_ps(x); }
  ATTEND_INLINE static F load(const float* p) { return _mm512_loadu_ps(p); }
  ATTEND_INLINE static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  ATTEND_INLINE static F add(F a, F b) { return _mm512_add_ps(a, b); }
  ATTEND_INLINE static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  ATTEND_INLINE static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  ATTEND_INLINE static F div(F a, F b) { return _mm512_div_ps(a, b); }
  ATTEND_INLINE static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  ATTEND_INLINE static F max(F a, F b) { return _mm512_max_ps(a, b); }
  ATTEND_INLINE static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  ATTEND_INLINE static F abs(F a) { return _mm512_abs_ps(a); }
  ATTEND_INLINE static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  ATTEND_INLINE static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
  ATTEND_INLINE static F iota(float start) {
    return _mm512_add_ps(_mm512_set1_ps(start),
                         _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  }
  /// x where lo <= lane index < hi, else `other`.
  ATTEND_INLINE static F keep_range(F x, int lo, int hi, F other) {
    const unsigned below_hi = hi >= 16 ? 0xffffU : hi <= 0 ? 0U : (1U << hi) - 1U;
    const unsigned below_lo = lo >= 16 ? 0xffffU : lo <= 0 ? 0U : (1U << lo) - 1U;
    return _mm512_mask_mov_ps(other, static_cast<__mmask16>(below_hi & ~below_lo), x);
  }
  /// True if any lane is an infinity or a NaN.
  ATTEND_INLINE static bool any_nonfinite(F x) { return _mm512_fpclass_ps_mask(x, 0x99) != 0; }

  /// 2^x, relative error < 2^-22; 0 below -126, +inf from 128 on, NaN stays NaN.
  ATTEND_INLINE static F exp2(F x) {
    const F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F f = _mm512_sub_ps(x, n);
    F p = set1(kExp2Poly[0]);
    for (int i = 1; i < kExp2Terms; ++i) p = fma(p, f, set1(kExp2Poly[i]));
    const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-126.0F), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, p, n);
  }
  /// exp2 of numbers whose integer parts are below 2^22, one step of all vectors after the other:
  /// one whole vector after the other would fill the scheduler with instructions that wait.
  template <int N>
  ATTEND_INLINE static void exp2_of_each(F (&x)[N]) {
    // Adding rounds to integers, and any port can add. What is too small for that becomes 0.
    const F magic = set1(12582912.0F);  // 1.5 * 2^23
    F n[N], f[N], e[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) n[v] = add(x[v], magic);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) n[v] = sub(n[v], magic);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) f[v] = sub(x[v], n[v]);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) e[v] = fma(set1(kExp2Poly[0]), f[v], set1(kExp2Poly[1]));
#pragma GCC unroll 8
    for (int i = 2; i < kExp2Terms; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) e[v] = fma(e[v], f[v], set1(kExp2Poly[i]));
    }
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const __mmask16 normal = _mm512_cmp_ps_mask(x[v], set1(-126.0F), _CMP_NLT_UQ);
      x[v] = _mm512_maskz_scalef_ps(normal, e[v], n[v]);
    }
  }

  ATTEND_INLINE static F widen(const float* p) { return _mm512_loadu_ps(p); }
  ATTEND_INLINE static F widen(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  ATTEND_INLINE static F widen(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  /// First 8 lanes only; the rest 0. Head sizes are multiples of 8.
  ATTEND_INLINE static F widen_half(const float* p) { return _mm512_maskz_loadu_ps(0xff, p); }
  ATTEND_INLINE static F widen_half(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(
            _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))),
        16));
  }
  ATTEND_INLINE static F widen_half(const f16* p) {
    return _mm512_cvtph_ps(
        _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  /// bf16 bits of 32 fp8 codes; every fp8 value is a bf16 value. NaN stays NaN.
  ATTEND_INLINE static __m512i decode_codes(fp8_e4m3, __m256i codes) {
    const __m512i c = _mm512_cvtepu8_epi16(codes);
    const __m512i magnitude = _mm512_and_si512(c, _mm512_set1_epi16(0x7f));
    const __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(c, magnitude), 8);
    // Exponents move from bias 7 to bias 127; the 8 subnormals come from a table.
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __m512i small =
        _mm512_castsi128_si512(_mm_setr_epi16(0, 118 << 7, 119 << 7, (119 << 7) | 64, 120 << 7,
                                              (120 << 7) | 32, (120 << 7) | 64, (120 << 7) | 96));
    bits = _mm512_mask_permutexvar_epi16(
        bits, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude, small);
    bits = _mm512_mask_mov_epi16(bits, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                                 _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(bits, sign);
  }
  ATTEND_INLINE static __m512i decode_codes(fp8_e5m2, __m256i codes) {
    const __m512i c = _mm512_cvtepu8_epi16(codes);
    const __m512i magnitude = _mm512_and_si512(c, _mm512_set1_epi16(0x7f));
    const __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(c, magnitude), 8);
    // Bias 15 to 127; infinity and NaN keep the largest exponent; 4 subnormals from a table.
    const __m512i offset = _mm512_mask_mov_epi16(
        _mm512_set1_epi16(112 << 7), _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(0x7c)),
        _mm512_set1_epi16(224 << 7));
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 5), offset);
    const __m512i small =
        _mm512_castsi128_si512(_mm_setr_epi16(0, 111 << 7, 112 << 7, (112 << 7) | 64, 0, 0, 0, 0));
    bits = _mm512_mask_permutexvar_epi16(
        bits, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(4)), magnitude, small);
    return _mm512_or_si512(bits, sign);
  }
  /// n codes, a multiple of 8, to the bf16 numbers that they stand for.
  template <typename Fp8>
  ATTEND_INLINE static void decode(const Fp8* from, int n, bf16* to) {
    int i = 0;
    for (; i + 32 <= n; i += 32)
      _mm512_storeu_si512(
          to + i,
          decode_codes(Fp8{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
    if (i == n) return;
    const __mmask32 rest = (1U << (n - i)) - 1U;
    _mm512_mask_storeu_epi16(to + i, rest,
                             decode_codes(Fp8{}, _mm256_maskz_loadu_epi8(rest, from + i)));
  }

  /// n int8 codes, a multiple of 8, to bf16, exactly.
  ATTEND_INLINE static void decode(const std::int8_t* from, int n, bf16* to) {
    for (int i = 0; i < n; i += 16) {
      const __mmask16 rest = n - i >= 16 ? 0xffff : 0xff;
      const __m512i codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(rest, from + i));
      const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(codes));
      _mm256_mask_storeu_epi16(to + i, rest, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
  }

  /// Rounded to nearest even in the upper half of each lane; the lower half holds rubbish.
  ATTEND_INLINE static __m512i round_bf16(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(r, nan, bits, _mm512_set1_epi32(0x400000));
  }
  ATTEND_INLINE static __m256i to_bf16(F x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(x), 16));
  }
  ATTEND_INLINE static __m256i to_f16(F x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  ATTEND_INLINE static void narrow(float* p, F x) { _mm512_storeu_ps(p, x); }
  ATTEND_INLINE static void narrow(bf16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x));
  }
  ATTEND_INLINE static void narrow(f16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(x));
  }
  ATTEND_INLINE static void narrow_half(float* p, F x) { _mm512_mask_storeu_ps(p, 0xff, x); }
  ATTEND_INLINE static void narrow_half(bf16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(to_bf16(x)));
  }
  ATTEND_INLINE static void narrow_half(f16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(to_f16(x)));
  }

  /// Interleaved columns: x[0], x[2].. and x[1], x[3].. of 32 values, two shifts instead of four
  /// conversions. Accumulators of such columns are woven together again by narrow_pairs.
  ATTEND_INLINE static void widen_pairs(const bf16* p, F* even, F* odd) {
    const __m512i x = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536)));
  }
  ATTEND_INLINE static void narrow_pairs(bf16* p, F even, F odd) {
    const __m512i low = _mm512_srli_epi32(round_bf16(even), 16);
    const __m512i high = _mm512_and_si512(round_bf16(odd), _mm512_set1_epi32(-65536));
    _mm512_storeu_si512(p, _mm512_or_si512(low, high));
  }

  template <typename T>
  ATTEND_INLINE static void narrow_pairs(T* p, F even, F odd) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    narrow(p, _mm512_permutex2var_ps(even, first, odd));
    narrow(p + kLanes, _mm512_permutex2var_ps(even, second, odd));
  }

  /// 32 bytes of `low` and of `high`, one above the other.
  ATTEND_INLINE static __m512i halves(const void* low, const void* high) {
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(low))),
        _mm256_loadu_si256(static_cast<const __m256i*>(high)), 1);
  }

  /// Transposes 16 rows of 8 32-bit elements; row(i) points to row i. Rows 4 apart enter a register
  /// together, so that two in-lane steps and one across lanes suffice.
  template <typename Row>
  ATTEND_INLINE static void transpose_16x8(const Row& row, __m512i (&out)[8]) {
    __m512i r[8], t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = halves(row(i), row(i + 4));
      r[4 + i] = halves(row(i + 8), row(i + 12));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
      t[i + 2] = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
      t[i + 3] = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      out[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      out[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    }
  }

  /// panel[d * kLd + lane] = rows[lane][d] for kLanes rows of head_dim elements (multiple of 8).
  /// Calls beside.beside_pack<bytes>() at every step of so many bytes.
  template <int kLd, typename Beside>
  ATTEND_INLINE static void pack_transposed(const float* const* rows, int head_dim, float* panel,
                                            Beside& beside) {
    for (int d = 0; d < head_dim; d += 8, panel += 8 * kLd) {
      beside.template beside_pack<16 * 8 * sizeof(float)>();
      __m512i r[8];
      transpose_16x8([&](int i) ATTEND_LAMBDA { return rows[i] + d; }, r);
      for (int i = 0; i < 8; ++i) store(panel + i * kLd, _mm512_castsi512_ps(r[i]));
    }
  }
  template <int kLd, typename Beside>
  ATTEND_INLINE static void pack_transposed(const f16* const* rows, int head_dim, float* panel,
                                            Beside& beside) {
    for (int d = 0; d < head_dim; d += 8, panel += 8 * kLd) {
      beside.template beside_pack<16 * 8 * sizeof(f16)>();
      alignas(64) float wide[16][8];
      for (int i = 0; i < 16; ++i)
        _mm256_store_ps(
            wide[i],
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + d))));
      __m512i r[8];
      transpose_16x8([&](int i) ATTEND_LAMBDA { return wide[i]; }, r);
      for (int i = 0; i < 8; ++i) store(panel + i * kLd, _mm512_castsi512_ps(r[i]));
    }
  }
  /// panel[d / 2 * kLd + lane] = the bf16 pair rows[lane][d], rows[lane][d + 1]; head_dim is a
  /// multiple of 16. Half the stores of pack_transposed, for panels that are read once.
  template <int kLd, typename Beside>
  ATTEND_INLINE static void pack_pairs(const bf16* const* rows, int head_dim, float* panel,
                                       Beside& beside) {
    for (int d = 0; d < head_dim; d += 16, panel += 8 * kLd) {
      beside.template beside_pack<16 * 16 * sizeof(bf16)>();
      __m512i r[8];
      transpose_16x8([&](int i) ATTEND_LAMBDA { return rows[i] + d; }, r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm512_storeu_si512(panel + i * kLd, r[i]);
    }
  }
  ATTEND_INLINE static F first_of_pairs(const float* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  ATTEND_INLINE static F second_of_pairs(const float* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)));
  }

  /// A 32-bit element is a pair of bf16: the transpose moves pairs, then they split.
  template <int kLd, typename Beside>
  ATTEND_INLINE static void pack_transposed(const bf16* const* rows, int head_dim, float* panel,
                                            Beside& beside) {
    int d = 0;
    for (; d + 16 <= head_dim; d += 16, panel += 16 * kLd) {
      beside.template beside_pack<16 * 16 * sizeof(bf16)>();
      __m512i r[8];
      transpose_16x8([&](int i) ATTEND_LAMBDA { return rows[i] + d; }, r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512i high = _mm512_and_si512(r[i], _mm512_set1_epi32(-65536));
        store(panel + 2 * i * kLd, _mm512_castsi512_ps(_mm512_slli_epi32(r[i], 16)));
        store(panel + (2 * i + 1) * kLd, _mm512_castsi512_ps(high));
      }
    }
    if (d == head_dim) return;
    alignas(64) float wide[16][8];
    for (int i = 0; i < 16; ++i) _mm512_mask_storeu_ps(wide[i], 0xff, widen_half(rows[i] + d));
    __m512i r[8];
    transpose_16x8([&](int i) ATTEND_LAMBDA { return wide[i]; }, r);
    for (int i = 0; i < 8; ++i) store(panel + i * kLd, _mm512_castsi512_ps(r[i]));
  }
};
