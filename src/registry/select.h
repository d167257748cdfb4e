// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/core/error.h"

namespace attend {

/// Reason against an automatic choice on a platform that `devices` leaves out (empty = any).
std::optional<std::string> platform_reason(const std::vector<DeviceType>& devices,
                                           const Platform& platform);

/// Automatic choice: validates every candidate and takes the first that fits. A candidate whose
/// capability excludes the platform's device gets that as its last reason. `Answer` is a Selection
/// or one of its shape.
template <typename Answer, typename Candidate, typename Config>
Answer select_first_of(std::span<const Candidate* const> candidates, const Config& config) {
  Answer selection;
  for (const Candidate* candidate : candidates) {
    std::vector<std::string> reasons = candidate->validate_configuration(config);
    if (auto reason = platform_reason(candidate->capability().devices, config.platform)) {
      reasons.push_back(*std::move(reason));
    }
    if (!reasons.empty()) {
      selection.rejected.emplace_back(candidate->name(), std::move(reasons));
    } else if (selection.backend == nullptr) {
      selection.backend = candidate;
    } else {
      selection.also_valid.emplace_back(candidate->name());
    }
  }
  return selection;
}

/// Choice of the user: only this one is validated, and its list of devices is not asked.
template <typename Answer, typename Candidate, typename Config>
Answer select_only_of(const Candidate& candidate, const Config& config) {
  Answer selection;
  std::vector<std::string> reasons = candidate.validate_configuration(config);
  if (reasons.empty()) {
    selection.backend = &candidate;
  } else {
    selection.rejected.emplace_back(candidate.name(), std::move(reasons));
  }
  return selection;
}

/// "FLASH_ATTN: [r1, r2]" for each rejected candidate.
std::vector<std::string> named_reasons(
    const std::vector<std::pair<std::string, std::vector<std::string>>>& rejected);

/// The choice. @throws Unsupported with all reasons if there is none; `kind` is what was looked for
/// ("attention back end"), `name` that of the user's choice or "auto".
template <typename Answer>
auto& require_choice(const Answer& selection, std::string_view kind, std::string_view name,
                     const std::string& config) {
  if (selection.backend != nullptr) return *selection.backend;
  const std::string what =
      name == "auto"
          ? "no valid " + std::string(kind) + " for {" + config + "}"
          : std::string(kind) + " " + std::string(name) + " is not valid for {" + config + "}";
  throw Unsupported(what, named_reasons(selection.rejected));
}

Selection select_first(std::span<const Backend* const> candidates, const AttentionConfig& config);
Selection select_only(const Backend& candidate, const AttentionConfig& config);

}  // namespace attend
