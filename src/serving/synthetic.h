// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "serving/trace.h"

namespace attend::serving {

/// Settings of the built-in workload, for users without a trace. Text form:
/// "synthetic" or "synthetic:key=value,key=value,..." with the keys below.
struct SyntheticConfig {
  std::int64_t requests = 64;
  double rate = 4.0;          ///< arrivals per second, Poisson; 0 = all at once
  std::int64_t prompt = 512;  ///< median prompt tokens, the shared ones not counted
  std::int64_t output = 64;   ///< median generated tokens
  double spread = 0.6;        ///< sigma of the log-normal lengths; 0 = all equal
  std::int64_t shared = 128;  ///< tokens of a system prompt that all requests begin with

  /// @throws InvalidArgument for an unknown key or a value out of range.
  static SyntheticConfig parse(std::string_view text);
};

/// True if a trace argument asks for the built-in workload and not for a file.
bool is_synthetic(std::string_view argument) noexcept;

/// Draws the workload; equal settings and seed give equal traces.
Trace make_synthetic(const SyntheticConfig& config, std::uint64_t seed);

}  // namespace attend::serving
