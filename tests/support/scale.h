// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdlib>
#include <string_view>

namespace attend::testing {

/// Size of a long test: `small` under ATTEND_TEST_SCALE=small, which the sanitizer and emulator
/// gates set because everything is 10 to 50 times slower there; `full` otherwise.
inline int scaled(int full, int small) {
  const char* scale = std::getenv("ATTEND_TEST_SCALE");
  return scale != nullptr && std::string_view(scale) == "small" ? small : full;
}

}  // namespace attend::testing
