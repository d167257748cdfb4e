// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <chrono>

#include "attend/core/executor.h"

/// The noise gate: what other programs take away while something is measured. A machine's
/// neighbours may show nowhere else, so workers spin and look at the clock.
namespace attend::bench {

/// Above this lost fraction a measurement is noisy: it is repeated, and marked if it stays so.
inline constexpr double kNoisyAbove = 0.02;

/// Spins on all workers: the share of the time that went elsewhere, for the worker that lost most.
double measure_lost_fraction(Executor& executor, double seconds);

/// Spin checks before, during and after a measurement.
class SpinChecks {
 public:
  explicit SpinChecks(Executor& executor) : executor_(executor) {}
  /// One check.
  void look(double seconds);
  /// A short check if the last one was some time ago; for between two runs.
  void look_now_and_then();
  /// Of the time of all checks so far.
  double lost_fraction() const noexcept { return seconds_ > 0.0 ? lost_ / seconds_ : 0.0; }

 private:
  Executor& executor_;
  double lost_ = 0.0, seconds_ = 0.0;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

/// Calls measure() until its result is quiet, `most` times at most, and returns the quietest. The
/// result has `lost_fraction`, and `attempts`, which becomes the number of calls.
template <typename Measure>
auto quietest(int most, const Measure& measure) {
  auto best = measure();
  int attempts = 1;
  for (; attempts < most && best.lost_fraction > kNoisyAbove; ++attempts) {
    auto next = measure();
    if (next.lost_fraction < best.lost_fraction) best = std::move(next);
  }
  best.attempts = attempts;
  return best;
}

}  // namespace attend::bench
