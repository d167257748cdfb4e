// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attend/core/executor.h"
#include "bench/harness.h"

/// Where the time of an attention case goes.
namespace attend::bench {

/// What the workers spend on one thing.
struct Share {
  std::string_view what;
  double share;  ///< of the time of all workers, from the beginning of a call to its end
};

struct Explanation {
  std::string name;
  std::string failure;  ///< why nothing was measured; "" = it was
  int threads = 0;
  int runs = 0;                ///< of each kind
  double seconds = 0.0;        ///< mean of the runs whose phases were measured
  double seconds_plain = 0.0;  ///< mean of the other runs, one after each
  /// queries and outputs, pack, QK, softmax, PV, merge, waiting, set-up; they add up to 1. What is
  /// packed inside of a multiplication counts as that; waiting for memory counts where it happens.
  /// Empty for what is not attention.
  std::vector<Share> shares;
  std::optional<Estimate> model;  ///< what the plan's cost model expects; none for some cases
  double lost_fraction = 0.0;     ///< as in CaseResult
  int attempts = 1;               ///< as in CaseResult
};

/// Prepares and verifies a case and measures its phases.
Explanation explain_case(const Case& c, Executor& executor, const Timing& timing);

}  // namespace attend::bench
