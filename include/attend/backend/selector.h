// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "attend/backend/backend.h"

namespace attend {

/// All back ends of this build, in the order of their names.
std::span<const Backend* const> backends() noexcept;
/// Back end of that name. @throws InvalidArgument listing the valid names.
const Backend& find_backend(std::string_view name);

/// Answer of the selector: the choice and why every other candidate was not taken.
struct Selection {
  const Backend* backend = nullptr;  ///< null = none fits
  /// (name, reasons) of every candidate that cannot serve the configuration, in priority order.
  std::vector<std::pair<std::string, std::vector<std::string>>> rejected;
  /// Names of candidates that could serve it but come later in priority order.
  std::vector<std::string> also_valid;
};

/// Candidates for a platform, best first.
std::vector<const Backend*> backend_priority(const AttentionConfig& config);

/// Validates every candidate and picks the first that fits; results are cached per configuration.
/// Never throws for "none fits": see Selection::backend.
Selection select_backend(const AttentionConfig& config);

/// Same, for a back end named by the user: only that one is validated.
/// @throws InvalidArgument for an unknown name.
Selection select_backend(const AttentionConfig& config, std::string_view name);

/// Like the two above, but throws Unsupported with all reasons if nothing fits.
const Backend& require_backend(const AttentionConfig& config, std::string_view name = "auto");

}  // namespace attend
