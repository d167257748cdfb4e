// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "attend/core/device.h"
#include "attend/core/dtype.h"

/// Reasons against a configuration that several kinds of back ends give.
namespace attend {

template <typename T>
bool contains(const std::vector<T>& values, const T& value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

/// "a, b or c"
template <typename T, typename Name>
std::string one_of(const std::vector<T>& values, Name name) {
  std::string text;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (i > 0) text += i + 1 == values.size() ? " or " : ", ";
    text += fmt::format("{}", name(values[i]));
  }
  return text;
}

/// `dtypes`: those that are served, empty = any; `cpu_only`: those of them that only the CPU
/// serves.
std::optional<std::string> dtype_reason(const std::vector<DType>& dtypes,
                                        const std::vector<DType>& cpu_only, DType dtype,
                                        const Platform& platform);

/// `least`: 10 * major + minor.
std::optional<std::string> cuda_capability_reason(int least, const Platform& platform);

}  // namespace attend
