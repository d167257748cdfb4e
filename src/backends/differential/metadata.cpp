// SPDX-License-Identifier: Apache-2.0
#include "backends/differential/metadata.h"

#include <algorithm>

namespace attend::differential {

bool is_pure_prefill(std::span<const std::int32_t> query_start_loc,
                     std::span<const std::int32_t> seq_lens) noexcept {
  for (std::size_t r = 0; r < seq_lens.size(); ++r)
    if (seq_lens[r] != query_start_loc[r + 1] - query_start_loc[r]) return false;
  return true;
}

std::int64_t first_without_slot(std::span<const std::int64_t> slots) noexcept {
  const auto found = std::ranges::find_if(slots, [](std::int64_t slot) { return slot < 0; });
  return found == slots.end() ? -1 : found - slots.begin();
}

}  // namespace attend::differential
