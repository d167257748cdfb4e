// SPDX-License-Identifier: Apache-2.0
#include "bench/harness.h"

#include <algorithm>
#include <chrono>

namespace attend::bench {
namespace {

/// Something to time, with the ceiling that binds it.
struct Timed {
  Part part;
  double ceiling = 0.0;
  std::vector<double> times = {};

  void measure_ceiling(Executor& executor) {
    ceiling = std::max(ceiling, measure_bound(part, executor));
  }
  void run() {
    const auto start = std::chrono::steady_clock::now();
    part.run();
    times.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  Speed speed() {
    Speed s;
    s.bound = part.bound;
    s.ceiling = ceiling;
    std::sort(times.begin(), times.end());
    s.seconds = times[times.size() / 2];
    s.seconds_min = times.front();
    s.gflops = part.flops / s.seconds * 1e-9;
    s.gbps = part.bytes / s.seconds * 1e-9;
    s.share = (part.bound == Bound::memory ? s.gbps : s.gflops) / ceiling;
    return s;
  }

 private:
  /// Decides which bound it is, too, if that depends on the machine.
  static double measure_bound(Part& part, Executor& executor) {
    constexpr double kSeconds = 0.15, kLargestRead = 2e9;
    switch (part.bound) {
      case Bound::compute:
        return measure_fma_gflops(executor, kSeconds);
      case Bound::int8_compute:
        return measure_int8_gops(executor, kSeconds);
      case Bound::indexer_compute:
        return measure_indexer_gflops(executor, kSeconds);
      case Bound::memory:
        return measure_read_gbps(
            executor, static_cast<std::size_t>(std::min(part.bytes, kLargestRead)), kSeconds);
      case Bound::indexer: {
        const double gflops = measure_indexer_gflops(executor, kSeconds);
        const double gbps =
            measure_read_gbps(executor, static_cast<std::size_t>(part.bytes), kSeconds);
        const bool reads = part.bytes / gbps > part.flops / gflops;
        part.bound = reads ? Bound::memory : Bound::indexer_compute;
        return reads ? gbps : gflops;
      }
      case Bound::parts:
        break;
    }
    return 0.0;
  }
};

/// Times a whole and its parts, in turn, and their ceilings before and after; spins in between.
double time_all(std::vector<Timed>& all, Executor& executor, double seconds) {
  constexpr std::size_t kMinRuns = 7;
  constexpr double kSpin = 0.05;
  SpinChecks spin(executor);
  spin.look(kSpin);
  for (Timed& t : all) t.measure_ceiling(executor);
  for (Timed& t : all) t.part.run();
  for (double total = 0.0; all.front().times.size() < kMinRuns || total < seconds;) {
    for (Timed& t : all) t.run();
    total += all.front().times.back();
    spin.look_now_and_then();
  }
  for (Timed& t : all) t.measure_ceiling(executor);
  spin.look(kSpin);
  return spin.lost_fraction();
}

/// One attempt; the whole is the first of `all`, its parts follow.
CaseResult measure(std::vector<Timed> all, Executor& executor, double seconds) {
  CaseResult result;
  result.lost_fraction = time_all(all, executor, seconds);
  Timed& whole = all.front();
  const double whole_seconds = whole.speed().seconds;
  double parts_seconds = 0.0;
  for (std::size_t i = 1; i < all.size(); ++i) {
    const Part& part = all[i].part;
    const Speed speed = all[i].speed();
    const double times = speed.seconds / whole_seconds;
    result.parts.push_back({std::string(part.name), speed, std::string(part.ratio.name),
                            part.ratio.of_whole ? 1.0 / times : times});
    parts_seconds += speed.seconds;
  }
  if (whole.part.bound == Bound::parts) whole.ceiling = whole.part.flops / parts_seconds * 1e-9;
  result.runs = static_cast<int>(whole.times.size());
  result.speed = whole.speed();
  result.parts_over_whole = parts_seconds / result.speed.seconds;
  return result;
}

}  // namespace

std::string_view to_string(Bound bound) noexcept {
  switch (bound) {
    case Bound::compute:
      return "compute";
    case Bound::int8_compute:
      return "int8 compute";
    case Bound::indexer_compute:
      return "compute of the indexer";
    case Bound::indexer:
      return "compute of the indexer or memory";
    case Bound::memory:
      return "memory";
    case Bound::parts:
      return "parts";
  }
  return "invalid bound";
}

std::unique_ptr<Executor> own_pool(const Case& c, const Executor& shared) {
  if (c.threads == 0 || c.threads == shared.num_workers()) return nullptr;
  return make_thread_pool(c.threads);
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const auto& some : {prefill_cases, decode_cases, differential_cases, cascade_cases,
                           int8_cases, cache_cases, indexer_cases, mla_cases, mla_context_cases,
                           mla_projection_cases, sparse_cases, sparse_backend_cases})
    for (Case& c : some()) cases.push_back(std::move(c));
  return cases;
}

CaseResult run_case(const Case& c, Executor& shared, const Timing& timing) {
  const auto own = own_pool(c, shared);
  Executor& executor = own ? *own : shared;
  const auto problem = c.make(executor);
  problem->run();
  CaseResult result;
  result.failure = problem->verify();
  result.speed.bound = c.bound;
  if (result.failure.empty()) {
    std::vector<Timed> all{
        {{c.name, c.bound, problem->flops(), problem->bytes(), [&] { problem->run(); }}}};
    for (Part& part : problem->parts()) all.push_back({std::move(part)});
    result = quietest(timing.attempts, [&] { return measure(all, executor, timing.seconds); });
    result.verified = true;
    if (!c.against_parts) result.parts_over_whole = 0.0;
  }
  result.name = c.name;
  result.threads = executor.num_workers();
  return result;
}

}  // namespace attend::bench
