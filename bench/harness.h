// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "attend/core/executor.h"
#include "bench/ceilings.h"

/// Verify, then time: a case that fails its check is reported and not timed.
namespace attend::bench {

/// Which ceiling binds a case.
enum class Bound : std::uint8_t { compute, int8_compute, memory };
std::string_view to_string(Bound bound) noexcept;

/// A prepared case: data in memory, plan made.
class Problem {
 public:
  virtual ~Problem() = default;
  virtual void run() = 0;
  /// Compares the last run with the oracle on sampled rows; "" = right, else what is wrong.
  virtual std::string verify() const = 0;
  virtual double flops() const { return 0.0; }  ///< useful operations of one run
  virtual double bytes() const = 0;             ///< bytes that one run must at least move
};

struct Case {
  std::string_view name;
  std::string_view description;
  Bound bound;
  std::function<std::unique_ptr<Problem>(Executor&)> make;
};

/// All cases, in the order in which they are reported.
std::vector<Case> all_cases();
std::vector<Case> attention_cases();
std::vector<Case> cache_cases();
std::vector<Case> int8_cases();

struct CaseResult {
  std::string name;
  bool verified = false;
  std::string failure;  ///< why it is not verified
  Bound bound = Bound::compute;
  double seconds = 0.0;  ///< median of one run
  double seconds_min = 0.0;
  int runs = 0;
  double gflops = 0.0;   ///< 0 for cases without arithmetic
  double gbps = 0.0;     ///< bytes() a second, in 1e9
  double ceiling = 0.0;  ///< GFLOP/s, int8 GOP/s or GB/s that binds, measured beside the case
  double share = 0.0;    ///< of that ceiling
  double lost_fraction = 0.0;
};

/// Prepares, verifies and times one case. The ceiling is measured before and after; the higher
/// counts.
CaseResult run_case(const Case& c, Executor& executor, double seconds);

}  // namespace attend::bench
