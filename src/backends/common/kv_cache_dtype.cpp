// SPDX-License-Identifier: Apache-2.0
#include "backends/common/kv_cache_dtype.h"

namespace attend {

std::string canonical_kv_cache_dtype(std::string_view name) {
  if (name.empty()) return "auto";
  const std::optional<DType> dtype = parse_dtype(name);
  return std::string(dtype ? to_string(*dtype) : name);
}

std::optional<DType> resolve_kv_cache_dtype(std::string_view name, DType compute) noexcept {
  if (name.empty() || name == "auto") return compute;
  return parse_dtype(name);
}

}  // namespace attend
