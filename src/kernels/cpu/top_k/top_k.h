// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/cpu.h"

/// Contract of the CPU kernels of top-k. Trusted input, no allocation.
namespace attend::cpu {

/// Entries that `out` of a collection needs beyond its capacity.
inline constexpr std::int64_t kCollectSlack = 64;

/// Writes the indices of the numbers of x[0, n) that are not below `threshold`, ascending, and
/// returns how many there are; NaN is below everything. If there are more than `capacity`, it
/// returns some number above it. @pre 0 <= n < 2^31, threshold is no NaN.
using CollectFn = std::int64_t (*)(const float* x, std::int64_t n, float threshold,
                                   std::int32_t* out, std::int64_t capacity) noexcept;

/// That of `level`; the same result on all of them.
CollectFn collect_of(IsaLevel level) noexcept;

}  // namespace attend::cpu
