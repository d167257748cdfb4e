// SPDX-License-Identifier: Apache-2.0
// Integer vocabulary of the avx512 and avx512_vnni levels. Included inside an ISA region and
// namespace, after Simd and dot_generic-inl.h, with ATTEND_VNNI defined.

struct Dot {
  static constexpr int kLanes = Simd::kLanes;
  using I = __m512i;

  ATTEND_INLINE static I zero() { return _mm512_setzero_si512(); }
  ATTEND_INLINE static I set1(std::int32_t x) { return _mm512_set1_epi32(x); }
  /// kLanes times 4 bytes.
  ATTEND_INLINE static I load(const void* p) { return _mm512_loadu_si512(p); }
  /// 4 bytes, in every lane.
  ATTEND_INLINE static I broadcast(const void* p) {
    std::int32_t x;
    std::memcpy(&x, p, sizeof x);
    return set1(x);
  }
  ATTEND_INLINE static Simd::F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  /// sum + the products of unsigned and signed bytes, exact.
  ATTEND_INLINE static I dot(I sum, I u8, I s8) {
#if ATTEND_VNNI
    return _mm512_dpbusd_epi32(sum, u8, s8);
#else
    // The instruction for bytes saturates its 16-bit sums: even and odd bytes are widened and
    // multiplied apart.
    const I even_u = _mm512_and_si512(u8, _mm512_set1_epi16(0xff));
    const I odd_u = _mm512_srli_epi16(u8, 8);
    const I even_s = _mm512_srai_epi16(_mm512_slli_epi16(s8, 8), 8);
    const I odd_s = _mm512_srai_epi16(s8, 8);
    return _mm512_add_epi32(
        sum, _mm512_add_epi32(_mm512_madd_epi16(even_u, even_s), _mm512_madd_epi16(odd_u, odd_s)));
#endif
  }
  /// Rounds numbers of [0, 127] to nearest even and stores them as bytes; NaN gives 0. Returns them
  /// as floats.
  ATTEND_INLINE static Simd::F store_rounded(std::uint8_t* to, Simd::F x) {
    // NaN: the maximum takes its second operand.
    const I rounded = _mm512_cvtps_epi32(_mm512_max_ps(x, Simd::zero()));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(rounded));
    return to_float(rounded);
  }

  /// 16 keys at a time, 32 dimensions at a time: a transpose of 32-bit elements.
  template <typename Beside>
  ATTEND_INLINE static void pack_keys(const std::int8_t* const* rows, int head_dim,
                                      std::uint8_t* panel, Beside& beside) {
    constexpr int kStep = 8 * kDotBytes;
    const I bias = _mm512_set1_epi8(-128);
    const int whole = head_dim / kStep * kStep;
    for (int j = 0; j < plan::kPanelKeys; j += kLanes) {
      for (int d = 0; d < whole; d += kStep) {
        beside.template beside_pack<kLanes * kStep>();
        I r[8];
        Simd::transpose_16x8([&](int i) ATTEND_LAMBDA { return rows[j + i] + d; }, r);
        std::uint8_t* to = panel + (std::int64_t{d} * plan::kPanelKeys + j * kDotBytes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
          _mm512_storeu_si512(to + i * plan::kPanelKeys * kDotBytes, _mm512_xor_si512(r[i], bias));
      }
    }
    pack_biased_keys(rows, whole, head_dim, panel);
  }

  template <typename Beside>
  ATTEND_INLINE static void pack_values(const std::int8_t* const* rows, int head_dim,
                                        std::int8_t* panel, Beside& beside) {
    // The dwords of a row are dealt to the lanes so that weaving inside lanes leaves the columns in
    // order.
    const I deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    int c = 0;
    for (; c + 64 <= head_dim; c += 64) {
      beside.template beside_weave<kDotBytes * 64>();
      const auto row = [&](int j) ATTEND_LAMBDA {
        return _mm512_permutexvar_epi32(deal, _mm512_loadu_si512(rows[j] + c));
      };
      const I a = row(0), b = row(1), d = row(2), e = row(3);
      const I ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
      const I de_low = _mm512_unpacklo_epi8(d, e), de_high = _mm512_unpackhi_epi8(d, e);
      std::int8_t* to = panel + c * kDotBytes;
      _mm512_storeu_si512(to, _mm512_unpacklo_epi16(ab_low, de_low));
      _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(ab_low, de_low));
      _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(ab_high, de_high));
      _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(ab_high, de_high));
    }
    weave_values(rows, c, head_dim, panel);
  }
};
