// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>
#include <vector>

#include "attend/backend/backend.h"

namespace attend {

/// Orders `all` for a configuration: the names of the priority table first, in its order, then the
/// others as they come. Names of the table that are not in `all` are skipped.
std::vector<const Backend*> order_by_priority(std::span<const Backend* const> all,
                                              const AttentionConfig& config);

}  // namespace attend
