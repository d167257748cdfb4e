// SPDX-License-Identifier: Apache-2.0
#include "bench/kernels/kernels.h"

namespace attend::bench::scalar {

double fma_loop(std::int64_t rounds) noexcept {
  constexpr int kLanes = 32;
  float a[kLanes];
  for (float& x : a) x = 1.0F;
  for (std::int64_t r = 0; r < rounds; ++r)
    for (float& x : a) x = x * 0.999F + 0.001F;
  float sum = 0.0F;
  for (const float x : a) sum += x;
  volatile float keep = sum;
  (void)keep;
  return 2.0 * kLanes * static_cast<double>(rounds);
}

void read_loop(const void* data, std::size_t bytes) noexcept {
  const auto* p = static_cast<const std::uint64_t*>(data);
  std::uint64_t sum[4] = {};
  for (std::size_t i = 0; i + 4 <= bytes / 8; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] += p[i + static_cast<std::size_t>(j)];
  volatile std::uint64_t keep = sum[0] + sum[1] + sum[2] + sum[3];
  (void)keep;
}

}  // namespace attend::bench::scalar
