// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "bench/kernels/kernels.h"
#include "kernels/cpu/region.h"

ATTEND_REGION_BEGIN("avx2,fma")
namespace attend::bench::avx2 {

double fma_loop(std::int64_t rounds) noexcept {
  constexpr int kChains = 12;
  __m256 a[kChains];
  for (auto& x : a) x = _mm256_set1_ps(1.0F);
  const __m256 b = _mm256_set1_ps(0.999F), c = _mm256_set1_ps(0.001F);
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) a[i] = _mm256_fmadd_ps(a[i], b, c);
  }
  __m256 sum = a[0];
  for (int i = 1; i < kChains; ++i) sum = _mm256_add_ps(sum, a[i]);
  volatile float keep = _mm256_cvtss_f32(sum);
  (void)keep;
  return 16.0 * kChains * static_cast<double>(rounds);
}

void read_loop(const void* data, std::size_t bytes) noexcept {
  const auto* p = static_cast<const char*>(data);
  __m256i sum[4];
  for (auto& x : sum) x = _mm256_setzero_si256();
  for (std::size_t i = 0; i + 128 <= bytes; i += 128)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[j] = _mm256_xor_si256(
          sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
  sum[0] = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  volatile int keep = _mm256_extract_epi32(sum[0], 0);
  (void)keep;
}

}  // namespace attend::bench::avx2
ATTEND_REGION_END
