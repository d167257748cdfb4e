// SPDX-License-Identifier: Apache-2.0
#include "backends/common/kv_cache_dtype.h"

namespace attend {

std::string canonical_kv_cache_dtype(std::string_view name) {
  if (name.empty()) return "auto";
  const std::optional<DType> dtype = parse_dtype(name);
  return std::string(dtype ? to_string(*dtype) : name);
}

std::optional<StoredKv> resolve_kv_cache_dtype(std::string_view name, DType compute) noexcept {
  if (name.empty() || name == "auto") return StoredKv{compute, KvFormat::plain};
  if (const std::optional<DType> dtype = parse_dtype(name))
    return StoredKv{*dtype, KvFormat::plain};
  const std::optional<KvFormat> format = parse_kv_format(name);
  if (!format || *format == KvFormat::plain) return std::nullopt;
  return StoredKv{stored_dtype(*format, compute), *format};
}

}  // namespace attend
