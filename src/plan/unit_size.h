// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>

namespace attend::plan {

/// Most rows of a prefill unit: large enough that packing K and V is cheap beside using them, small
/// enough that a unit's state stays in L2. Fewer where the workers would not all get their units.
inline constexpr int kMaxUnitRows = 1024;
inline constexpr int kMinUnitRows = 192;
/// Sum of the two head sizes up to which units have so many rows; of larger heads fewer fit L2.
inline constexpr int kWholeHeadDims = 512;
/// Units that each worker should get at least, so that the dynamic order can balance them.
inline constexpr int kUnitsPerWorker = 4;

/// Most rows of a unit of a batch, unless the heads of one token are more. `head_dims`: of keys and
/// of values together.
inline int max_unit_rows(std::int64_t num_tokens, int num_q_heads, int head_dims, int num_workers) {
  const std::int64_t units = std::int64_t{kUnitsPerWorker} * num_workers;
  const int most = head_dims <= kWholeHeadDims
                       ? kMaxUnitRows
                       : std::max(kMinUnitRows, kMaxUnitRows * kWholeHeadDims / (2 * head_dims));
  return static_cast<int>(
      std::clamp<std::int64_t>(num_tokens * num_q_heads / units, kMinUnitRows, most));
}

}  // namespace attend::plan
