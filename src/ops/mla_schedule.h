// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace attend::ops {

/// FlashMLA's schedule of a batch.
struct MlaSchedule {
  std::vector<std::array<std::int32_t, 8>> parts;
  std::vector<std::int32_t> num_splits;  ///< [B + 1]
};
/// @pre num_parts >= 1, lengths >= 0, at least one.
MlaSchedule mla_schedule(std::span<const std::int32_t> lengths, int num_parts);

}  // namespace attend::ops
