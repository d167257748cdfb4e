// SPDX-License-Identifier: Apache-2.0
// The table of back ends: one generated line for each folder of src/backends that registers itself.
#include <vector>

#include "attend/backend/selector.h"
#include "registry/named.h"

namespace attend {

#define ATTEND_BACKEND(name)         \
  namespace name {                   \
  const Backend& backend() noexcept; \
  }
#include "backends.inc"
#undef ATTEND_BACKEND

std::span<const Backend* const> backends() noexcept {
  static const std::vector<const Backend*> all = sorted_by_name<Backend>({
#define ATTEND_BACKEND(name) &name::backend(),
#include "backends.inc"
#undef ATTEND_BACKEND
  });
  return all;
}

const Backend& find_backend(std::string_view name) {
  return find_by_name("find_backend", backends(), name);
}

}  // namespace attend
