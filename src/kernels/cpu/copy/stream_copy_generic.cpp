// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "kernels/cpu/copy/stream_copy.h"

namespace attend::cpu {

void stream_copy(std::byte* dst, const std::byte* src, std::size_t bytes) noexcept {
  std::memcpy(dst, src, bytes);
}

void stream_fence() noexcept {}

}  // namespace attend::cpu
