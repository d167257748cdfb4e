// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

namespace attend {

enum class DeviceType : std::uint8_t { cpu, cuda, rocm };

/// Where a tensor lives.
struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;  ///< ordinal; 0 for cpu
  friend bool operator==(const Device&, const Device&) = default;
};

/// What a selection is asked for: a kind of machine, not necessarily this one.
/// Text forms: "cpu", "cuda:9.0" (compute capability), "rocm:gfx942" (architecture).
struct Platform {
  DeviceType type = DeviceType::cpu;
  int capability_major = 0;  ///< cuda only, else 0
  int capability_minor = 0;  ///< cuda only, else 0
  std::string arch;          ///< rocm only ("gfx942"), else empty

  /// Parses a text form. @throws InvalidArgument for anything else.
  static Platform parse(std::string_view text);
  /// 10 * major + minor; 0 unless cuda.
  int capability() const noexcept { return 10 * capability_major + capability_minor; }
  friend bool operator==(const Platform&, const Platform&) = default;
};

std::string_view to_string(DeviceType t) noexcept;
std::string to_string(const Device& d);
std::string to_string(const Platform& p);

}  // namespace attend
