// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "kernels/cpu/region.h"
#include "kernels/cpu/top_k/collect.h"

ATTEND_REGION_BEGIN("avx512f")
namespace attend::cpu::avx512 {

std::int64_t collect(const float* x, std::int64_t n, float threshold, std::int32_t* out,
                     std::int64_t capacity) noexcept {
  const __m512 least = _mm512_set1_ps(threshold);
  const __m512i step = _mm512_set1_epi32(16);
  __m512i index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; i += 64) {
    if (count > capacity) return count;
#pragma GCC unroll 4
    for (std::int64_t j = i; j < i + 64; j += 16) {
      const std::int64_t left = n - j;
      const auto there = static_cast<__mmask16>(left >= 16  ? 0xffff
                                                : left <= 0 ? 0
                                                            : (1 << left) - 1);
      const __m512 v = _mm512_maskz_loadu_ps(there, x + j);
      const __mmask16 found = _mm512_mask_cmp_ps_mask(there, v, least, _CMP_GE_OQ);
      // Whole registers: storing single lanes is slow on some processors.
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(found, index));
      count += __builtin_popcount(found);
      index = _mm512_add_epi32(index, step);
    }
  }
  return count;
}

}  // namespace attend::cpu::avx512
ATTEND_REGION_END
