// SPDX-License-Identifier: Apache-2.0
// The table of back ends: one generated line for each folder of src/backends that registers itself.
#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/core/error.h"

namespace attend {

#define ATTEND_BACKEND(name)         \
  namespace name {                   \
  const Backend& backend() noexcept; \
  }
#include "backends.inc"
#undef ATTEND_BACKEND

std::span<const Backend* const> backends() noexcept {
  static const std::vector<const Backend*> all = [] {
    std::vector<const Backend*> list = {
#define ATTEND_BACKEND(name) &name::backend(),
#include "backends.inc"
#undef ATTEND_BACKEND
    };
    std::sort(list.begin(), list.end(),
              [](const Backend* a, const Backend* b) { return a->name() < b->name(); });
    return list;
  }();
  return all;
}

const Backend& find_backend(std::string_view name) {
  std::string valid;
  for (const Backend* backend : backends()) {
    if (backend->name() == name) return *backend;
    valid += fmt::format("{}{}", valid.empty() ? "" : ", ", backend->name());
  }
  throw InvalidArgument("find_backend", "name", fmt::format("one of {}", valid),
                        fmt::format("'{}'", name));
}

}  // namespace attend
