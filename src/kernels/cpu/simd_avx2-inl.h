// SPDX-License-Identifier: Apache-2.0
// Vector vocabulary of the avx2 level. Included inside an ISA region and namespace, after
// <immintrin.h> and attend/core/float_types.h.

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 6;  // 6 x 2 accumulators of the 16 registers
  static constexpr int kTileVecs = 2;
  using F = __m256;

  ATTEND_INLINE static F zero() { return _mm256_setzero_ps(); }
  ATTEND_INLINE static F set1(float x) { return _mm256_set1_ps(x); }
  ATTEND_INLINE static F load(const float* p) { return _mm256_loadu_ps(p); }
  ATTEND_INLINE static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  ATTEND_INLINE static F add(F a, F b) { return _mm256_add_ps(a, b); }
  ATTEND_INLINE static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  ATTEND_INLINE static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  ATTEND_INLINE static F div(F a, F b) { return _mm256_div_ps(a, b); }
  ATTEND_INLINE static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  ATTEND_INLINE static F max(F a, F b) { return _mm256_max_ps(a, b); }
  ATTEND_INLINE static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  ATTEND_INLINE static F abs(F a) { return _mm256_andnot_ps(set1(-0.0F), a); }
  ATTEND_INLINE static float reduce_max(F a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
  ATTEND_INLINE static float reduce_add(F a) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
  ATTEND_INLINE static F iota(float start) {
    return add(set1(start), _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0));
  }
  /// x where lo <= lane index < hi, else `other`.
  ATTEND_INLINE static F keep_range(F x, int lo, int hi, F other) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane),
                                           _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(in));
  }
  /// True if any lane is an infinity or a NaN.
  ATTEND_INLINE static bool any_nonfinite(F x) {
    const F largest = set1(3.402823466e+38F);
    return _mm256_movemask_ps(_mm256_cmp_ps(abs(x), largest, _CMP_NLE_UQ)) != 0;
  }

  ATTEND_INLINE static F power_of_two(__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
  }
  /// 2^x, relative error < 2^-22; 0 below -126, +inf from 128 on, NaN stays NaN.
  ATTEND_INLINE static F exp2(F x) {
    const F bounded = _mm256_min_ps(set1(128.0F), x);  // keeps NaN: the second operand wins
    const F n = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F f = sub(bounded, n);
    F p = set1(kExp2Poly[0]);
    for (int i = 1; i < kExp2Terms; ++i) p = fma(p, f, set1(kExp2Poly[i]));
    // Two factors, because 2^128 alone is not a float.
    const __m256i e = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(e, 1);
    p = mul(mul(p, power_of_two(half)), power_of_two(_mm256_sub_epi32(e, half)));
    p = _mm256_and_ps(p, _mm256_cmp_ps(x, set1(-126.0F), _CMP_NLT_UQ));
    return p;
  }
  template <int N>
  ATTEND_INLINE static void exp2_of_each(F (&x)[N]) {
    for (int v = 0; v < N; ++v) x[v] = exp2(x[v]);
  }

  ATTEND_INLINE static F widen(const float* p) { return _mm256_loadu_ps(p); }
  ATTEND_INLINE static F widen(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  ATTEND_INLINE static F widen(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  /// a where the mask's 16-bit lanes are set, else b.
  ATTEND_INLINE static __m256i choose(__m256i mask, __m256i a, __m256i b) {
    return _mm256_blendv_epi8(b, a, mask);
  }
  /// 16-bit table entries of the codes below 8, from the tables of their halves.
  ATTEND_INLINE static __m256i look_up(__m128i low, __m128i high, __m256i magnitude) {
    // Index 0x80 and above gives 0: the upper byte of each lane.
    const __m256i index = _mm256_or_si256(magnitude, _mm256_set1_epi16(-32768));
    const __m256i l = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(low), index);
    const __m256i h = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(high), index);
    return _mm256_or_si256(l, _mm256_slli_epi16(h, 8));
  }
  /// bf16 bits of 16 fp8 codes; every fp8 value is a bf16 value. NaN stays NaN.
  ATTEND_INLINE static __m256i decode_codes(fp8_e4m3, __m128i codes) {
    const __m256i c = _mm256_cvtepu8_epi16(codes);
    const __m256i magnitude = _mm256_and_si256(c, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(c, magnitude), 8);
    // Exponents move from bias 7 to bias 127; the 8 subnormals come from a table.
    __m256i bits = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi16(120 << 7));
    const __m256i small =
        look_up(_mm_setr_epi8(0, 0, -128, -64, 0, 32, 64, 96, 0, 0, 0, 0, 0, 0, 0, 0),
                _mm_setr_epi8(0, 59, 59, 59, 60, 60, 60, 60, 0, 0, 0, 0, 0, 0, 0, 0), magnitude);
    bits = choose(_mm256_cmpgt_epi16(_mm256_set1_epi16(8), magnitude), small, bits);
    bits = choose(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7fc0),
                  bits);
    return _mm256_or_si256(bits, sign);
  }
  ATTEND_INLINE static __m256i decode_codes(fp8_e5m2, __m128i codes) {
    const __m256i c = _mm256_cvtepu8_epi16(codes);
    const __m256i magnitude = _mm256_and_si256(c, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(c, magnitude), 8);
    // Bias 15 to 127; infinity and NaN keep the largest exponent; 4 subnormals from a table.
    const __m256i offset = choose(_mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(0x7b)),
                                  _mm256_set1_epi16(224 << 7), _mm256_set1_epi16(112 << 7));
    __m256i bits = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 5), offset);
    const __m256i small =
        look_up(_mm_setr_epi8(0, -128, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
                _mm_setr_epi8(0, 55, 56, 56, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), magnitude);
    bits = choose(_mm256_cmpgt_epi16(_mm256_set1_epi16(4), magnitude), small, bits);
    return _mm256_or_si256(bits, sign);
  }
  /// n codes, a multiple of 8, to the bf16 numbers that they stand for.
  template <typename Fp8>
  ATTEND_INLINE static void decode(const Fp8* from, int n, bf16* to) {
    int i = 0;
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(to + i),
          decode_codes(Fp8{}, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    if (i == n) return;
    const __m256i bits =
        decode_codes(Fp8{}, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_castsi256_si128(bits));
  }

  /// n int8 codes, a multiple of 8, to bf16, exactly.
  ATTEND_INLINE static void decode(const std::int8_t* from, int n, bf16* to) {
    for (int i = 0; i < n; i += 8) {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
      narrow(to + i, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)));
    }
  }

  /// Rounded to nearest even in the upper half of each lane; the lower half holds rubbish.
  ATTEND_INLINE static __m256i round_bf16(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
  }
  ATTEND_INLINE static __m128i to_bf16(F x) {
    const __m256i r = _mm256_srli_epi32(round_bf16(x), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  /// Interleaved columns: x[0], x[2].. and x[1], x[3].. of 16 values. Accumulators of such columns
  /// are woven together again by narrow_pairs.
  ATTEND_INLINE static void widen_pairs(const bf16* p, F* even, F* odd) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-65536)));
  }
  ATTEND_INLINE static void narrow_pairs(bf16* p, F even, F odd) {
    const __m256i low = _mm256_srli_epi32(round_bf16(even), 16);
    const __m256i high = _mm256_and_si256(round_bf16(odd), _mm256_set1_epi32(-65536));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, high));
  }
  ATTEND_INLINE static void narrow(float* p, F x) { _mm256_storeu_ps(p, x); }
  ATTEND_INLINE static void narrow(bf16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x));
  }
  ATTEND_INLINE static void narrow(f16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <typename T>
  ATTEND_INLINE static void narrow_pairs(T* p, F even, F odd) {
    const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    narrow(p, _mm256_permute2f128_ps(low, high, 0x20));
    narrow(p + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
  }

  /// panel[d * kLd + lane] = rows[lane][d] for kLanes rows of head_dim elements (multiple of 8).
  template <int kLd, typename T, typename Beside>
  ATTEND_INLINE static void pack_transposed(const T* const* rows, int head_dim, float* panel,
                                            Beside& beside) {
    for (int d = 0; d < head_dim; d += 8) {
      beside.template beside_pack<8 * 8 * sizeof(T)>();
      F r[8], t[8];
      for (int i = 0; i < 8; ++i) r[i] = widen(rows[i] + d);
      for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
      }
      for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
      }
      for (int i = 0; i < 4; ++i) {
        store(panel + (d + i) * kLd, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
        store(panel + (d + 4 + i) * kLd, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
      }
    }
  }
};
