// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/backend/backend.h"
#include "backends/common/kv_cache_dtype.h"

namespace attend::flash_attn {

/// Checks the constants of a layer and returns what its cache holds.
/// @throws InvalidArgument naming the field that is out of range.
StoredKv check_config(const ImplConfig& config);

}  // namespace attend::flash_attn
