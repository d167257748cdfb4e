// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>

namespace attend::testing {

/// Calls of operator new in this program so far, by any thread.
std::size_t num_allocations() noexcept;

}  // namespace attend::testing
