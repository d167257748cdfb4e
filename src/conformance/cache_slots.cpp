// SPDX-License-Identifier: Apache-2.0
#include "conformance/cache_slots.h"

#include "conformance/random_blocks.h"

namespace attend::conformance {

std::vector<std::int64_t> random_slots(Rng& rng, int tokens, std::int64_t capacity) {
  const std::vector<std::int32_t> order = shuffled(rng, capacity);
  const bool repeats = rng.chance(0.2);
  std::vector<std::int64_t> slots;
  slots.reserve(static_cast<std::size_t>(tokens) + 1);
  for (int t = 0; t < tokens; ++t) {
    std::int64_t slot = order[static_cast<std::size_t>(t)];
    if (rng.chance(0.1)) slot = -rng.range(1, 100);
    if (repeats && t > 0 && rng.chance(0.3)) slot = slots.back();
    slots.push_back(slot);
  }
  return slots;
}

}  // namespace attend::conformance
