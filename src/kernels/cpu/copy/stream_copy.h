// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>

namespace attend::cpu {

/// Copies to memory that will not be read before it has left the caches: writes around them where
/// the processor can, which saves reading every line before it is overwritten.
/// @pre The regions do not overlap. Call stream_fence() before another thread reads `dst`.
void stream_copy(std::byte* dst, const std::byte* src, std::size_t bytes) noexcept;

/// Makes the calling thread's streamed bytes visible before anything that it writes later.
void stream_fence() noexcept;

}  // namespace attend::cpu
