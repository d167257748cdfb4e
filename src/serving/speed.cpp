// SPDX-License-Identifier: Apache-2.0
#include "serving/speed.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace attend::serving {

Speed measure_speed(std::span<const StepRecord> steps, double ceiling_gflops, double ceiling_gbps) {
  const bool divisible = ceiling_gflops > 0 && ceiling_gbps > 0;
  double flops = 0, bytes = 0, prefill_seconds = 0, decode_seconds = 0;
  for (const StepRecord& s : steps) {
    double prefill_part = s.prefill_flops > 0 ? 1 : 0;
    double decode_part = s.decode_bytes > 0 ? 1 : 0;
    if (prefill_part + decode_part > 1) {
      if (!divisible) continue;
      const double prefill_cost = s.prefill_flops / ceiling_gflops;
      const double decode_cost = s.decode_bytes / ceiling_gbps;
      prefill_part = prefill_cost / (prefill_cost + decode_cost);
      decode_part = 1 - prefill_part;
    }
    flops += s.prefill_flops;
    bytes += s.decode_bytes;
    prefill_seconds += s.forward_seconds * prefill_part;
    decode_seconds += s.forward_seconds * decode_part;
  }
  Speed speed;
  if (prefill_seconds > 0) speed.prefill_gflops = flops / prefill_seconds * 1e-9;
  if (decode_seconds > 0) speed.decode_gbps = bytes / decode_seconds * 1e-9;
  return speed;
}

double step_percentile_ms(std::span<const StepRecord> steps, double percent) {
  if (steps.empty()) return 0;
  std::vector<double> seconds;
  seconds.reserve(steps.size());
  for (const StepRecord& s : steps) seconds.push_back(s.seconds);
  const double rank = std::ceil(percent / 100.0 * static_cast<double>(seconds.size()));
  const auto index = static_cast<std::ptrdiff_t>(std::max(rank, 1.0)) - 1;
  std::nth_element(seconds.begin(), seconds.begin() + index, seconds.end());
  return seconds[static_cast<std::size_t>(index)] * 1e3;
}

}  // namespace attend::serving
