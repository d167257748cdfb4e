// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

namespace attend::oracle {

/// The indices of the highest values, ascending, and then -1, by sorting all of them: the lower
/// index first among equal values, NaN after every number.
void top_k(std::span<const double> values, std::span<std::int64_t> indices);

}  // namespace attend::oracle
