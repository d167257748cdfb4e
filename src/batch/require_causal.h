// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/batch/common_metadata.h"
#include "core/check.h"

namespace attend {

/// @throws InvalidArgument of `op` that names causal or request_causal unless every request is
/// causal.
inline void require_causal(std::string_view op, const CommonMetadata& m) {
  if (m.request_causal.empty()) {
    check::require(m.causal, {op, "causal"}, "true", "false");
    return;
  }
  for (int r = 0; r < m.num_reqs; ++r) {
    check::require(m.request_causal[static_cast<std::size_t>(r)] != 0, {op, "request_causal"},
                   "1 for every request", [&] { return fmt::format("0 at index {}", r); });
  }
}

}  // namespace attend
