// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "conformance/rng.h"

namespace attend::conformance {

/// Slots of `tokens` rows below `capacity` >= tokens, scattered; some negative, sometimes with one
/// slot for several rows. data() is not null without tokens.
std::vector<std::int64_t> random_slots(Rng& rng, int tokens, std::int64_t capacity);

}  // namespace attend::conformance
