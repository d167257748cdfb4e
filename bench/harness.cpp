// SPDX-License-Identifier: Apache-2.0
#include "bench/harness.h"

#include <algorithm>
#include <chrono>

namespace attend::bench {
namespace {

double measure_bound(const Case& c, const Problem& problem, Executor& executor) {
  constexpr double kSeconds = 0.15;
  switch (c.bound) {
    case Bound::compute:
      return measure_fma_gflops(executor, kSeconds);
    case Bound::int8_compute:
      return measure_int8_gops(executor, kSeconds);
    case Bound::memory:
      break;
  }
  return measure_read_gbps(executor, static_cast<std::size_t>(problem.bytes()), kSeconds);
}

double time_once(Problem& problem) {
  const auto start = std::chrono::steady_clock::now();
  problem.run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::string_view to_string(Bound bound) noexcept {
  switch (bound) {
    case Bound::compute:
      return "compute";
    case Bound::int8_compute:
      return "int8 compute";
    case Bound::memory:
      return "memory";
  }
  return "invalid bound";
}

std::vector<Case> all_cases() {
  std::vector<Case> cases = attention_cases();
  for (Case& c : int8_cases()) cases.push_back(std::move(c));
  for (Case& c : cache_cases()) cases.push_back(std::move(c));
  return cases;
}

CaseResult run_case(const Case& c, Executor& executor, double seconds) {
  CaseResult result;
  result.name = c.name;
  result.bound = c.bound;
  const auto problem = c.make(executor);
  problem->run();
  result.failure = problem->verify();
  result.verified = result.failure.empty();
  if (!result.verified) return result;

  result.lost_fraction = measure_lost_fraction(executor, 0.1);
  const double before = measure_bound(c, *problem, executor);
  problem->run();
  std::vector<double> times;
  double total = 0.0;
  constexpr std::size_t kMinRuns = 7;
  while (times.size() < kMinRuns || total < seconds) {
    times.push_back(time_once(*problem));
    total += times.back();
  }
  result.ceiling = std::max(before, measure_bound(c, *problem, executor));
  std::sort(times.begin(), times.end());
  result.seconds = times[times.size() / 2];
  result.seconds_min = times.front();
  result.runs = static_cast<int>(times.size());
  result.gflops = problem->flops() / result.seconds * 1e-9;
  result.gbps = problem->bytes() / result.seconds * 1e-9;
  result.share = (c.bound == Bound::memory ? result.gbps : result.gflops) / result.ceiling;
  return result;
}

}  // namespace attend::bench
