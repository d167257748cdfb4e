// SPDX-License-Identifier: Apache-2.0
// fp8 codes to bf16 by looking bytes up (AVX-512 VBMI). Included inside an ISA region and
// namespace, after Simd.

/// Only fp8 codes have a table.
template <typename T>
struct CodeTable {
  static constexpr bool kExists = false;
};

template <typename Fp8>
  requires(std::is_same_v<Fp8, fp8_e4m3> || std::is_same_v<Fp8, fp8_e5m2>)
struct CodeTable<Fp8> {
  static constexpr bool kExists = true;
  __m512i low[2], high[2];

  ATTEND_INLINE CodeTable() {
    const Fp8Table& table = std::is_same_v<Fp8, fp8_e4m3> ? kE4m3Table : kE5m2Table;
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(table.low.data() + 64 * i);
      high[i] = _mm512_load_si512(table.high.data() + 64 * i);
    }
  }

  /// Low and high bytes of the bf16 numbers of 64 codes, in their places.
  ATTEND_INLINE void look_up(__m512i codes, __m512i* l, __m512i* h) const {
    *l = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    const __m512i magnitude = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    // magnitude | (codes & 0x80)
    *h = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(-128), 0xf8);
  }

  /// n codes, a multiple of 64.
  ATTEND_INLINE void decode(const Fp8* from, int n, bf16* to) const {
    const __m512i deal = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < n; i += 64) {
      __m512i l, h;
      look_up(_mm512_permutexvar_epi64(deal, _mm512_loadu_si512(from + i)), &l, &h);
      _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(l, h));
      _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(l, h));
    }
  }

  /// Keys as bf16 pairs, head_dim a multiple of 32: panel[d / 2 * kLd + lane] has dimensions d and
  /// d + 2 of row `lane` where d % 4 == 0, and the next row of the panel d + 1 and d + 3.
  template <int kLd, typename Beside>
  ATTEND_INLINE void pack_pairs(const Fp8* const* rows, int head_dim, float* panel,
                                Beside& beside) const {
    const __m512i even = _mm512_set1_epi16(0xff);
    for (int d = 0; d < head_dim; d += 32, panel += 16 * kLd) {
      beside.template beside_pack<16 * 32>();
      __m512i r[8];
      Simd::transpose_16x8([&](int i) ATTEND_LAMBDA { return rows[i] + d; }, r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        __m512i l, h;
        look_up(r[i], &l, &h);
        // (h << 8) | (l & 0xff), and (h & 0xff00) | (l >> 8)
        _mm512_storeu_si512(panel + 2 * i * kLd,
                            _mm512_ternarylogic_epi32(_mm512_slli_epi16(h, 8), l, even, 0xf8));
        _mm512_storeu_si512(panel + (2 * i + 1) * kLd,
                            _mm512_ternarylogic_epi32(_mm512_srli_epi16(l, 8), even, h, 0xf2));
      }
    }
  }
};
