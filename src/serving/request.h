// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace attend::serving {

/// A stretch of prompt tokens that several requests may share: positions from the end of the
/// segment before it up to `end`. Equal ids at equal positions mean equal tokens.
struct ContentSegment {
  std::uint64_t id = 0;
  std::int64_t end = 0;  ///< first position after the segment
  friend bool operator==(const ContentSegment&, const ContentSegment&) = default;
};

/// One request of a trace.
struct Request {
  std::int64_t id = 0;                   ///< position in the trace, unique
  double arrival = 0.0;                  ///< seconds since the first request
  std::int64_t prompt_tokens = 0;        ///< >= 1
  std::int64_t output_tokens = 0;        ///< >= 0; 0 = only the prompt is computed
  std::vector<ContentSegment> segments;  ///< ascending ends <= prompt_tokens; may be empty

  /// Tokens whose keys and values are ever needed: the last generated one is never read again.
  std::int64_t kv_tokens() const noexcept {
    return prompt_tokens + std::max<std::int64_t>(output_tokens, 1) - 1;
  }
};

/// ceil(a / b) for a >= 0, b > 0.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) noexcept { return (a + b - 1) / b; }

}  // namespace attend::serving
