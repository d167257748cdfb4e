// SPDX-License-Identifier: Apache-2.0
#include "attend/core/device.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <optional>

#include "attend/core/error.h"

namespace attend {
namespace {

std::optional<int> parse_number(std::string_view text, int smallest, int largest) noexcept {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  if (value < smallest || value > largest) return std::nullopt;
  return value;
}

std::optional<Platform> parse_cuda(std::string_view capability) {
  const auto dot = capability.find('.');
  if (dot == std::string_view::npos) return std::nullopt;
  const auto major = parse_number(capability.substr(0, dot), 1, 99);
  const auto minor = parse_number(capability.substr(dot + 1), 0, 9);
  if (!major || !minor) return std::nullopt;
  return Platform{DeviceType::cuda, *major, *minor, {}};
}

std::optional<Platform> parse_rocm(std::string_view arch) {
  constexpr std::string_view kPrefix = "gfx";
  if (!arch.starts_with(kPrefix) || arch.size() == kPrefix.size()) return std::nullopt;
  const bool is_hex = std::ranges::all_of(arch.substr(kPrefix.size()), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  });
  if (!is_hex) return std::nullopt;
  return Platform{DeviceType::rocm, 0, 0, std::string(arch)};
}

}  // namespace

Platform Platform::parse(std::string_view text) {
  constexpr std::string_view kCuda = "cuda:";
  constexpr std::string_view kRocm = "rocm:";
  std::optional<Platform> p;
  if (text == "cpu") p = Platform{};
  if (text.starts_with(kCuda)) p = parse_cuda(text.substr(kCuda.size()));
  if (text.starts_with(kRocm)) p = parse_rocm(text.substr(kRocm.size()));
  if (!p) {
    throw InvalidArgument("Platform::parse", "text",
                          "cpu, cuda:MAJOR.MINOR (like cuda:9.0) or rocm:ARCH (like rocm:gfx942)",
                          fmt::format("'{}'", text));
  }
  return *p;
}

std::string_view to_string(DeviceType t) noexcept {
  switch (t) {
    case DeviceType::cpu:
      return "cpu";
    case DeviceType::cuda:
      return "cuda";
    case DeviceType::rocm:
      return "rocm";
  }
  return "invalid device";
}

std::string to_string(const Device& d) { return fmt::format("{}:{}", to_string(d.type), d.index); }

std::string to_string(const Platform& p) {
  switch (p.type) {
    case DeviceType::cuda:
      return fmt::format("cuda:{}.{}", p.capability_major, p.capability_minor);
    case DeviceType::rocm:
      return fmt::format("rocm:{}", p.arch);
    case DeviceType::cpu:
      break;
  }
  return "cpu";
}

}  // namespace attend
