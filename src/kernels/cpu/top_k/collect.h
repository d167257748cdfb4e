// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "kernels/cpu/top_k/top_k.h"

/// The functions of the levels.
namespace attend::cpu {
namespace scalar {
std::int64_t collect(const float* x, std::int64_t n, float threshold, std::int32_t* out,
                     std::int64_t capacity) noexcept;
}  // namespace scalar
namespace avx2 {
std::int64_t collect(const float* x, std::int64_t n, float threshold, std::int32_t* out,
                     std::int64_t capacity) noexcept;
}  // namespace avx2
namespace avx512 {
std::int64_t collect(const float* x, std::int64_t n, float threshold, std::int32_t* out,
                     std::int64_t capacity) noexcept;
}  // namespace avx512
}  // namespace attend::cpu
