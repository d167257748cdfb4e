// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "conformance/storage.h"

namespace attend::conformance {

/// What running one case on one ISA level gave.
struct Outcome {
  double worst_error = 0.0;  ///< largest |got - expected|
  double worst_ratio = 0.0;  ///< largest |got - expected| / bound; <= 1 unless failed
  std::string failure;       ///< first failure in words; empty = passed

  bool failed() const noexcept { return !failure.empty(); }
  /// Keeps the first failure.
  void fail(std::string text) {
    if (failure.empty()) failure = std::move(text);
  }
};

/// Compares one element; `where` makes the words that name it, only when it is wrong.
void compare(Outcome& outcome, double got, double expected, double bound,
             const std::function<std::string()>& where);

/// Compares every element of a tensor, in logical row-major order, accepts them as written, and
/// then reports anything else that changed in its memory. @pre reset() was called before the op.
void compare_written(Outcome& outcome, std::string_view name, Storage& got,
                     std::span<const double> expected, std::span<const double> bound);

/// Reports a change of memory that had to stay as it was.
void expect_undamaged(Outcome& outcome, std::string_view name, const Storage& storage);

}  // namespace attend::conformance
