// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "attend/core/dtype.h"

namespace attend {

/// One spelling for each kv_cache_dtype: "bfloat16" becomes "bf16", "" becomes "auto"; names that
/// are no dtype (a packed format) stay as they are.
std::string canonical_kv_cache_dtype(std::string_view name);

/// Element type of a cache: `compute` for "auto", the named dtype otherwise; nullopt if the name is
/// no dtype.
std::optional<DType> resolve_kv_cache_dtype(std::string_view name, DType compute) noexcept;

}  // namespace attend
