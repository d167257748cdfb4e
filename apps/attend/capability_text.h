// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <fmt/format.h>

#include <string>
#include <vector>

#include "attend/core/device.h"
#include "attend/core/dtype.h"

namespace attend::cli {

template <typename T>
std::vector<std::string> names(const std::vector<T>& values) {
  std::vector<std::string> texts;
  for (const T& value : values) texts.emplace_back(to_string(value));
  return texts;
}

inline std::string list(const std::vector<std::string>& texts) {
  return texts.empty() ? "any" : fmt::format("{}", fmt::join(texts, ", "));
}

/// "f16, bf16, f32 (cpu only: f32)"
inline std::string dtype_list(const std::vector<DType>& dtypes,
                              const std::vector<DType>& cpu_only) {
  const std::string text = list(names(dtypes));
  return cpu_only.empty() ? text : fmt::format("{} (cpu only: {})", text, list(names(cpu_only)));
}

/// "multiples of 8, at most 256"; `most` 0 = no limit.
inline std::string multiples(int step, int most) {
  return fmt::format("multiples of {}{}", step,
                     most > 0 ? fmt::format(", at most {}", most) : std::string());
}

/// `least`: 10 * major + minor, 0 = any.
inline std::string capability_text(int least) {
  return least == 0 ? "any" : fmt::format("at least {}.{}", least / 10, least % 10);
}

}  // namespace attend::cli
