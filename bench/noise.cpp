// SPDX-License-Identifier: Apache-2.0
#include "bench/noise.h"

#include <algorithm>
#include <vector>

namespace attend::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point start, Clock::time_point end) {
  return std::chrono::duration<double>(end - start).count();
}

}  // namespace

double measure_lost_fraction(Executor& executor, double seconds) {
  std::vector<double> lost(static_cast<std::size_t>(executor.num_workers()));
  executor.run([&](int worker) {
    // Two looks at the clock are some 50 ns apart: more than 5 us between them went elsewhere.
    constexpr double kGap = 5e-6;
    const auto start = Clock::now();
    auto last = start;
    double sum = 0.0;
    do {
      const auto now = Clock::now();
      const double gap = seconds_between(last, now);
      if (gap > kGap) sum += gap;
      last = now;
    } while (seconds_between(start, last) < seconds);
    lost[static_cast<std::size_t>(worker)] = sum / seconds_between(start, last);
  });
  return *std::max_element(lost.begin(), lost.end());
}

void SpinChecks::look(double seconds) {
  lost_ += measure_lost_fraction(executor_, seconds) * seconds;
  seconds_ += seconds;
  last_ = Clock::now();
}

void SpinChecks::look_now_and_then() {
  constexpr double kEvery = 0.05, kSeconds = 0.01;
  if (seconds_between(last_, Clock::now()) >= kEvery) look(kSeconds);
}

}  // namespace attend::bench
