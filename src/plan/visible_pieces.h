// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>

#include "attend/plan/attention_plan.h"

namespace attend::plan {

/// Pieces [first, last).
struct PieceRange {
  std::int32_t first, last;
};

/// A request's lengths and mask.
struct RequestMask {
  std::int64_t num_keys, query_len;
  int window_left, window_right;  ///< -1 = all; window_right is 0 for causal requests
};

/// Pieces that queries [begin, end) of a request can see.
inline PieceRange visible_pieces(const RequestMask& r, int begin, int end) {
  const std::int64_t shift = r.num_keys - r.query_len;
  std::int64_t lo = 0, hi = r.num_keys;
  if (r.window_left >= 0) lo = std::max<std::int64_t>(0, begin + shift - r.window_left);
  if (r.window_right >= 0)
    hi = std::clamp<std::int64_t>(end - 1 + shift + r.window_right + 1, 0, r.num_keys);
  if (lo >= hi) return {0, 0};
  return {static_cast<std::int32_t>(lo / kPieceSize),
          static_cast<std::int32_t>((hi + kPieceSize - 1) / kPieceSize)};
}

}  // namespace attend::plan
