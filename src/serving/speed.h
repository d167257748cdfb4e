// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>

namespace attend::serving {

/// What one step took and did, all layers together.
struct StepRecord {
  double seconds = 0;          ///< scheduling, metadata and all layers; input generation excluded
  double forward_seconds = 0;  ///< the layers alone, cache writes included
  double prefill_flops = 0;    ///< useful ones
  double decode_bytes = 0;     ///< keys and values read by decode requests
};

/// Rates of a run. 0 where nothing was measured.
struct Speed {
  double prefill_gflops = 0;
  double decode_gbps = 0;
};

/// A step that holds both kinds of work is divided in proportion to the time that each kind would
/// take at its ceiling, so both get the same share of their ceiling in that step. A ceiling of 0 is
/// unknown: such steps are then left out.
Speed measure_speed(std::span<const StepRecord> steps, double ceiling_gflops, double ceiling_gbps);

/// Step latency in milliseconds that `percent` % of the steps do not exceed; 0 without steps.
double step_percentile_ms(std::span<const StepRecord> steps, double percent);

}  // namespace attend::serving
