// SPDX-License-Identifier: Apache-2.0
#include "attend/backend/selector.h"

#include <fmt/format.h>

#include "attend/core/error.h"
#include "registry/select.h"
#include "registry/selection_cache.h"

namespace attend {
namespace {

/// "FLASH_ATTN: [r1, r2]" for each rejected back end.
std::vector<std::string> named_reasons(const Selection& selection) {
  std::vector<std::string> lines;
  for (const auto& [name, reasons] : selection.rejected) {
    lines.push_back(fmt::format("{}: [{}]", name, fmt::join(reasons, ", ")));
  }
  return lines;
}

}  // namespace

Selection select_backend(const AttentionConfig& config) {
  static SelectionCache cache;
  return cache.get(config,
                   [](const AttentionConfig& c) { return select_first(backend_priority(c), c); });
}

Selection select_backend(const AttentionConfig& config, std::string_view name) {
  return select_only(find_backend(name), config);
}

const Backend& require_backend(const AttentionConfig& config, std::string_view name) {
  const bool automatic = name == "auto";
  const Selection selection = automatic ? select_backend(config) : select_backend(config, name);
  if (selection.backend != nullptr) return *selection.backend;
  const std::string what =
      automatic ? fmt::format("no valid attention back end for {{{}}}", describe(config))
                : fmt::format("back end {} is not valid for {{{}}}", name, describe(config));
  throw Unsupported(what, named_reasons(selection));
}

}  // namespace attend
