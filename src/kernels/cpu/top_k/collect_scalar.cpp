// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "kernels/cpu/top_k/collect.h"

namespace attend::cpu::scalar {

std::int64_t collect(const float* x, std::int64_t n, float threshold, std::int32_t* out,
                     std::int64_t capacity) noexcept {
  std::int64_t count = 0;
  for (std::int64_t begin = 0; begin < n; begin += kCollectSlack) {
    if (count > capacity) return count;
    const std::int64_t end = std::min(begin + kCollectSlack, n);
    for (std::int64_t i = begin; i < end; ++i) {
      // Stored in any case: a branch would be hard to predict.
      out[count] = static_cast<std::int32_t>(i);
      count += x[i] >= threshold ? 1 : 0;
    }
  }
  return count;
}

}  // namespace attend::cpu::scalar
