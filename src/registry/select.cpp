// SPDX-License-Identifier: Apache-2.0
#include "registry/select.h"

#include <fmt/format.h>

#include <algorithm>

namespace attend {

std::optional<std::string> platform_reason(const std::vector<DeviceType>& devices,
                                           const Platform& platform) {
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

std::vector<std::string> named_reasons(
    const std::vector<std::pair<std::string, std::vector<std::string>>>& rejected) {
  std::vector<std::string> lines;
  for (const auto& [name, reasons] : rejected) {
    lines.push_back(fmt::format("{}: [{}]", name, fmt::join(reasons, ", ")));
  }
  return lines;
}

Selection select_first(std::span<const Backend* const> candidates, const AttentionConfig& config) {
  return select_first_of<Selection>(candidates, config);
}

Selection select_only(const Backend& candidate, const AttentionConfig& config) {
  return select_only_of<Selection>(candidate, config);
}

}  // namespace attend
