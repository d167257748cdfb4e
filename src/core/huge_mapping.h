// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>

namespace attend {

/// Memory of a mapping of its own.
struct HugeMapping {
  void* data = nullptr;  ///< aligned to kHugePageBytes, zero, not touched yet; null = none was had
  int advice_error = 0;  ///< errno of asking for huge pages; 0 if it was not refused
};

/// Maps `bytes` > 0 rounded up to whole huge pages, and asks for huge pages if `huge`. A page on
/// each side must not be touched: it stops what runs over an end, and keeps the kernel from making
/// one mapping of this and another.
HugeMapping map_huge_pages(std::size_t bytes, bool huge) noexcept;

/// @pre `data` and `bytes` are those of a mapping.
void unmap_huge_pages(void* data, std::size_t bytes) noexcept;

}  // namespace attend
