// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "kernels/cpu/region.h"
#include "kernels/cpu/top_k/collect.h"

ATTEND_REGION_BEGIN("avx2")
namespace attend::cpu::avx2 {

std::int64_t collect(const float* x, std::int64_t n, float threshold, std::int32_t* out,
                     std::int64_t capacity) noexcept {
  const __m256 least = _mm256_set1_ps(threshold);
  std::int64_t count = 0, i = 0;
  for (; i + 16 <= n; i += 16) {
    if (count > capacity) return count;
    const __m256 low = _mm256_cmp_ps(_mm256_loadu_ps(x + i), least, _CMP_GE_OQ);
    const __m256 high = _mm256_cmp_ps(_mm256_loadu_ps(x + i + 8), least, _CMP_GE_OQ);
    unsigned found = static_cast<unsigned>(_mm256_movemask_ps(low)) |
                     static_cast<unsigned>(_mm256_movemask_ps(high)) << 8;
    // Most are far below.
    for (; found != 0; found &= found - 1)
      out[count++] = static_cast<std::int32_t>(i + __builtin_ctz(found));
  }
  for (; i < n; ++i)
    if (x[i] >= threshold) out[count++] = static_cast<std::int32_t>(i);
  return count;
}

}  // namespace attend::cpu::avx2
ATTEND_REGION_END
