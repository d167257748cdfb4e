// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>
#include <string_view>

#include "attend/dist/decode_context_parallel.h"

/// Arithmetic of the ownership of tokens, for checked layouts.
namespace attend::dcp {

/// @throws InvalidArgument unless both numbers are >= 1.
void check_layout(std::string_view op, const DcpLayout& layout);
/// @throws InvalidArgument unless rank is in [0, world_size).
void check_rank(std::string_view op, int rank, const DcpLayout& layout);

/// N * I: positions after which the ownership repeats.
inline std::int64_t period(const DcpLayout& layout) noexcept {
  return std::int64_t{layout.world_size} * layout.interleave;
}

inline int owner(std::int64_t position, const DcpLayout& layout) noexcept {
  return static_cast<int>(position / layout.interleave % layout.world_size);
}

inline std::int64_t local_index(std::int64_t position, const DcpLayout& layout) noexcept {
  return position / period(layout) * layout.interleave + position % layout.interleave;
}

/// How many of the positions [0, n) `rank` holds. Whole periods give `interleave` tokens to every
/// rank; the rest fills rank after rank.
inline std::int64_t local_count(std::int64_t n, int rank, const DcpLayout& layout) noexcept {
  const std::int64_t whole = n / period(layout);
  const std::int64_t rest = n - whole * period(layout);
  const std::int64_t before = std::int64_t{rank} * layout.interleave;
  return whole * layout.interleave + std::clamp<std::int64_t>(rest - before, 0, layout.interleave);
}

}  // namespace attend::dcp
