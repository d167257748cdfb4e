// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace attend::top_k {

/// The min(k, n) highest of n logits, ascending by index, then -1: k results. Ties and NaN as
/// ops/top_k.h says. @pre 0 <= n < 2^31, k >= 1.
void select_row(const float* logits, std::int64_t n, std::int64_t k, std::int32_t* out) noexcept;

}  // namespace attend::top_k
