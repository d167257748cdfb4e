// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "attend/cache/kv_cache_spec.h"
#include "attend/core/dtype.h"

namespace attend {

/// One spelling for each kv_cache_dtype: "bfloat16" becomes "bf16", "" becomes "auto"; names that
/// are no dtype (a format) stay as they are.
std::string canonical_kv_cache_dtype(std::string_view name);

/// What a cache holds.
struct StoredKv {
  DType dtype = DType::bf16;
  KvFormat format = KvFormat::plain;
  friend bool operator==(const StoredKv&, const StoredKv&) = default;
};

/// `compute` for "auto", the named dtype, or the named format with its stored_dtype(); nullopt for
/// any other name.
std::optional<StoredKv> resolve_kv_cache_dtype(std::string_view name, DType compute) noexcept;

}  // namespace attend
