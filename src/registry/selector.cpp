// SPDX-License-Identifier: Apache-2.0
#include "attend/backend/selector.h"

#include "registry/select.h"
#include "registry/selection_cache.h"

namespace attend {

Selection select_backend(const AttentionConfig& config) {
  static SelectionCache cache;
  return cache.get(config,
                   [](const AttentionConfig& c) { return select_first(backend_priority(c), c); });
}

Selection select_backend(const AttentionConfig& config, std::string_view name) {
  return select_only(find_backend(name), config);
}

const Backend& require_backend(const AttentionConfig& config, std::string_view name) {
  const Selection selection =
      name == "auto" ? select_backend(config) : select_backend(config, name);
  return require_choice(selection, name == "auto" ? "attention back end" : "back end", name,
                        describe(config));
}

}  // namespace attend
