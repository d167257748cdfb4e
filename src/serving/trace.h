// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <string_view>
#include <vector>

#include "attend/core/error.h"
#include "serving/request.h"

/// Request traces: who asks when, with how long a prompt, for how many tokens.
namespace attend::serving {

/// A trace that cannot be read. Text: "FILE:LINE:COLUMN: expected ..., got ..." (both from 1).
class TraceError : public Error {
 public:
  using Error::Error;
  TraceError(std::string_view file, std::size_t line, std::size_t column, std::string_view expected,
             std::string_view got);
};

/// Longest prompt or output that a trace may ask for, so that positions fit 32 bits.
inline constexpr std::int64_t kMaxTokens = 1 << 30;

struct Trace {
  std::string name;               ///< the file, or the synthetic generator's settings
  std::string_view format;        ///< "azure", "mooncake", "lengths" or "synthetic"
  std::vector<Request> requests;  ///< in order of arrival, ids in that order; at least one
};

/// Reads a trace file, whose format shows in its first line:
///  - azure: CSV with TIMESTAMP, ContextTokens, GeneratedTokens;
///  - mooncake: JSON lines with timestamp (ms), input_length, output_length, hash_ids, one id for
///    each 512 prompt tokens, where equal ids are equal tokens;
///  - lengths: CSV with num_prefill_tokens, num_decode_tokens; all requests arrive at once.
/// @throws TraceError for a missing, malformed or empty file.
Trace read_trace(const std::string& path);
/// Same, from a stream; `name` is used in messages.
Trace read_trace(std::istream& in, const std::string& name);

/// Keeps the first `count` requests.
void limit_requests(Trace& trace, std::int64_t count);
/// Multiplies all lengths by `factor`; none drops below one token. Shared segments scale alike, so
/// equal ids still mean equal tokens at equal positions.
/// @throws InvalidArgument unless factor is finite and > 0 and no length leaves the valid range.
void scale_lengths(Trace& trace, double factor);

}  // namespace attend::serving
