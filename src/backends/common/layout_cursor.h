// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

namespace attend {

/// Gives out places in a workspace, one behind the other, in bytes from its aligned start.
class LayoutCursor {
 public:
  static constexpr std::size_t kAlignment = 64;

  explicit LayoutCursor(std::size_t begin) : at_(begin) {}
  std::size_t take(std::size_t bytes) {
    const std::size_t here = at_;
    at_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return here;
  }
  std::size_t at() const { return at_; }

 private:
  std::size_t at_;
};

/// The first aligned byte of a workspace.
inline std::byte* aligned_start(void* data) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  constexpr auto kStep = static_cast<std::uintptr_t>(LayoutCursor::kAlignment);
  return reinterpret_cast<std::byte*>((address + kStep - 1) / kStep * kStep);
}

}  // namespace attend
