// SPDX-License-Identifier: Apache-2.0
#include "registry/select.h"

#include <fmt/format.h>

#include <algorithm>

namespace attend {
namespace {

std::optional<std::string> platform_reason(const Backend& candidate, const Platform& platform) {
  const std::vector<DeviceType>& devices = candidate.capability().devices;
  if (devices.empty() ||
      std::find(devices.begin(), devices.end(), platform.type) != devices.end()) {
    return std::nullopt;
  }
  std::string names;
  for (const DeviceType device : devices) {
    names += fmt::format("{}{}", names.empty() ? "" : ", ", to_string(device));
  }
  return fmt::format(
      "platform not supported: {} (chosen automatically on {} only; elsewhere ask for it by name)",
      to_string(platform), names);
}

}  // namespace

Selection select_first(std::span<const Backend* const> candidates, const AttentionConfig& config) {
  Selection selection;
  for (const Backend* candidate : candidates) {
    std::vector<std::string> reasons = candidate->validate_configuration(config);
    if (auto reason = platform_reason(*candidate, config.platform)) {
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

Selection select_only(const Backend& candidate, const AttentionConfig& config) {
  Selection selection;
  std::vector<std::string> reasons = candidate.validate_configuration(config);
  if (reasons.empty()) {
    selection.backend = &candidate;
  } else {
    selection.rejected.emplace_back(candidate.name(), std::move(reasons));
  }
  return selection;
}

}  // namespace attend
