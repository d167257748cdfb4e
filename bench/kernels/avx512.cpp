// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "bench/kernels/kernels.h"
#include "kernels/cpu/region.h"

ATTEND_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma")
namespace attend::bench::avx512 {

double fma_loop(std::int64_t rounds) noexcept {
  constexpr int kChains = 16;
  __m512 a[kChains];
  for (auto& x : a) x = _mm512_set1_ps(1.0F);
  const __m512 b = _mm512_set1_ps(0.999F), c = _mm512_set1_ps(0.001F);
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) a[i] = _mm512_fmadd_ps(a[i], b, c);
  }
  __m512 sum = a[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, a[i]);
  volatile float keep = _mm512_cvtss_f32(sum);
  (void)keep;
  return 32.0 * kChains * static_cast<double>(rounds);
}

double bf16_dot_loop(std::int64_t rounds) noexcept {
  constexpr int kChains = 16;
  __m512 a[kChains];
  for (auto& x : a) x = _mm512_setzero_ps();
  const auto b = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) a[i] = _mm512_dpbf16_ps(a[i], b, b);
  }
  __m512 sum = a[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, a[i]);
  volatile float keep = _mm512_cvtss_f32(sum);
  (void)keep;
  return 64.0 * kChains * static_cast<double>(rounds);
}

double int8_dot_loop(std::int64_t rounds) noexcept {
  constexpr int kChains = 16;
  __m512i a[kChains];
  for (auto& x : a) x = _mm512_setzero_si512();
  const __m512i b = _mm512_set1_epi8(1);
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) a[i] = _mm512_dpbusd_epi32(a[i], b, b);
  }
  __m512i sum = a[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_epi32(sum, a[i]);
  volatile int keep = _mm512_cvtsi512_si32(sum);
  (void)keep;
  return 128.0 * kChains * static_cast<double>(rounds);
}

void read_loop(const void* data, std::size_t bytes) noexcept {
  const auto* p = static_cast<const char*>(data);
  __m512i sum[4];
  for (auto& x : sum) x = _mm512_setzero_si512();
  for (std::size_t i = 0; i + 256 <= bytes; i += 256)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(p + i + 64 * j));
  sum[0] = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  volatile int keep = _mm512_cvtsi512_si32(sum[0]);
  (void)keep;
}

}  // namespace attend::bench::avx512
ATTEND_REGION_END
