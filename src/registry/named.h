// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "attend/core/error.h"

/// What registries of named back ends share, whatever the back ends are for.
namespace attend {

template <typename T>
std::vector<const T*> sorted_by_name(std::vector<const T*> list) {
  std::sort(list.begin(), list.end(), [](const T* a, const T* b) { return a->name() < b->name(); });
  return list;
}

/// @throws InvalidArgument listing the valid names, in the name of `op`.
template <typename T>
const T& find_by_name(std::string_view op, std::span<const T* const> all, std::string_view name) {
  std::string valid;
  for (const T* candidate : all) {
    if (candidate->name() == name) return *candidate;
    valid += fmt::format("{}{}", valid.empty() ? "" : ", ", candidate->name());
  }
  throw InvalidArgument(op, "name", fmt::format("one of {}", valid), fmt::format("'{}'", name));
}

/// Those that `best_first` names, in its order, then the others as they come. Names that are not in
/// `all` are skipped.
template <typename T>
std::vector<const T*> order_by_names(std::span<const T* const> all,
                                     std::span<const std::string_view> best_first) {
  std::vector<const T*> ordered;
  for (const std::string_view name : best_first) {
    const auto it =
        std::find_if(all.begin(), all.end(), [&](const T* b) { return b->name() == name; });
    if (it != all.end()) ordered.push_back(*it);
  }
  for (const T* candidate : all) {
    if (std::find(ordered.begin(), ordered.end(), candidate) == ordered.end())
      ordered.push_back(candidate);
  }
  return ordered;
}

}  // namespace attend
