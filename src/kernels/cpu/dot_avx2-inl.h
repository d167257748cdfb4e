// SPDX-License-Identifier: Apache-2.0
// Integer vocabulary of the avx2 level. Included inside an ISA region and namespace, after Simd and
// dot_generic-inl.h.

struct Dot {
  static constexpr int kLanes = Simd::kLanes;
  using I = __m256i;

  ATTEND_INLINE static I zero() { return _mm256_setzero_si256(); }
  ATTEND_INLINE static I set1(std::int32_t x) { return _mm256_set1_epi32(x); }
  /// kLanes times 4 bytes.
  ATTEND_INLINE static I load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  /// 4 bytes, in every lane.
  ATTEND_INLINE static I broadcast(const void* p) {
    std::int32_t x;
    std::memcpy(&x, p, sizeof x);
    return set1(x);
  }
  ATTEND_INLINE static Simd::F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  /// sum + the products of unsigned and signed bytes. The instruction for bytes saturates its
  /// 16-bit sums, so even and odd bytes are widened and multiplied apart: exact.
  ATTEND_INLINE static I dot(I sum, I u8, I s8) {
    const I even_u = _mm256_and_si256(u8, _mm256_set1_epi16(0xff));
    const I odd_u = _mm256_srli_epi16(u8, 8);
    const I even_s = _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8);
    const I odd_s = _mm256_srai_epi16(s8, 8);
    return _mm256_add_epi32(
        sum, _mm256_add_epi32(_mm256_madd_epi16(even_u, even_s), _mm256_madd_epi16(odd_u, odd_s)));
  }
  /// Rounds numbers of [0, 127] to nearest even and stores them as bytes; NaN gives 0. Returns them
  /// as floats.
  ATTEND_INLINE static Simd::F store_rounded(std::uint8_t* to, Simd::F x) {
    const I rounded = _mm256_cvtps_epi32(_mm256_max_ps(x, Simd::zero()));  // NaN: second operand
    const I pairs = _mm256_packs_epi32(rounded, rounded);
    const I bytes = _mm256_packus_epi16(pairs, pairs);
    const std::int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    std::memcpy(to, &low, sizeof low);
    std::memcpy(to + 4, &high, sizeof high);
    return to_float(rounded);
  }
  template <typename Beside>
  ATTEND_INLINE static void pack_keys(const std::int8_t* const* rows, int head_dim,
                                      std::uint8_t* panel, Beside& beside) {
    beside.template beside_pack<0>();
    pack_biased_keys(rows, 0, head_dim, panel);
  }
  template <typename Beside>
  ATTEND_INLINE static void pack_values(const std::int8_t* const* rows, int head_dim,
                                        std::int8_t* panel, Beside& beside) {
    beside.template beside_weave<0>();
    const auto half = [&](int j, int c) ATTEND_LAMBDA {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[j] + c));
    };
    for (int c = 0; c < head_dim; c += 8) {
      const __m128i ab = _mm_unpacklo_epi8(half(0, c), half(1, c));
      const __m128i cd = _mm_unpacklo_epi8(half(2, c), half(3, c));
      auto* to = reinterpret_cast<__m128i*>(panel + c * kDotBytes);
      _mm_storeu_si128(to, _mm_unpacklo_epi16(ab, cd));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(ab, cd));
    }
  }
};
