// SPDX-License-Identifier: Apache-2.0
#include <emmintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/cpu/copy/stream_copy.h"

namespace attend::cpu {
namespace {

constexpr std::size_t kLine = 64;

// Copies one line to an aligned address with the stores of the baseline (SSE2).
void stream_line(std::byte* dst, const std::byte* src) noexcept {
  const auto* from = reinterpret_cast<const __m128i*>(src);
  auto* to = reinterpret_cast<__m128i*>(dst);
  const __m128i a = _mm_loadu_si128(from);
  const __m128i b = _mm_loadu_si128(from + 1);
  const __m128i c = _mm_loadu_si128(from + 2);
  const __m128i d = _mm_loadu_si128(from + 3);
  _mm_stream_si128(to, a);
  _mm_stream_si128(to + 1, b);
  _mm_stream_si128(to + 2, c);
  _mm_stream_si128(to + 3, d);
}

}  // namespace

void stream_copy(std::byte* dst, const std::byte* src, std::size_t bytes) noexcept {
  // Parts of lines are cheaper through the caches: a streamed part makes the memory read the rest.
  const std::size_t head = (kLine - reinterpret_cast<std::uintptr_t>(dst) % kLine) % kLine;
  if (bytes < head + kLine) {
    std::memcpy(dst, src, bytes);
    return;
  }
  // The hardware's prefetcher stops at the end of a page: ask for the next one in time.
  constexpr std::size_t kAhead = 1024;
  std::memcpy(dst, src, head);
  std::size_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(src) + i + kAhead, _MM_HINT_T0);
    stream_line(dst + i, src + i);
  }
  std::memcpy(dst + i, src + i, bytes - i);
}

void stream_fence() noexcept { _mm_sfence(); }

}  // namespace attend::cpu
