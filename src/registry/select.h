// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>

#include "attend/backend/selector.h"

namespace attend {

/// Automatic choice: validates every candidate and takes the first that fits. A candidate whose
/// capability excludes the platform's device gets that as its last reason.
Selection select_first(std::span<const Backend* const> candidates, const AttentionConfig& config);

/// Choice of the user: only this one is validated, and its list of devices is not asked.
Selection select_only(const Backend& candidate, const AttentionConfig& config);

}  // namespace attend
