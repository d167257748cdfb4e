// SPDX-License-Identifier: Apache-2.0
#include "bench/explain.h"

#include <array>
#include <chrono>
#include <memory>

#include "kernels/cpu/attention/phase.h"

namespace attend::bench {
namespace {

using cpu::kNumPhases;
using cpu::Phase;
using cpu::PhaseClock;

/// Ticks of calls.
struct Ticks {
  std::array<double, kNumPhases> phases{};  ///< of all workers
  double calls = 0.0;                       ///< of the caller
  double alone = 0.0;  ///< of the caller, out of kernels while no other worker could work
};

/// Gives this thread a clock for the length of a scope.
class Clocked {
 public:
  explicit Clocked(PhaseClock& clock) : clock_(clock), before_(cpu::thread_phase_clock()) {
    clock_.last = cpu::tick_count();
    cpu::thread_phase_clock() = &clock_;
  }
  ~Clocked() {
    clock_.enter(Phase::outside);
    cpu::thread_phase_clock() = before_;
  }
  Clocked(const Clocked&) = delete;
  Clocked& operator=(const Clocked&) = delete;

 private:
  PhaseClock& clock_;
  PhaseClock* before_;
};

/// Runs tasks on another executor; while it measures, every worker has a clock.
class ClockedExecutor : public Executor {
 public:
  explicit ClockedExecutor(Executor& inner)
      : inner_(inner), clocks_(static_cast<std::size_t>(inner.num_workers())) {}

  int num_workers() const noexcept override { return inner_.num_workers(); }
  void run(FunctionRef<void(int worker)> task) override {
    if (!measuring_) {
      inner_.run(task);
      return;
    }
    const std::uint64_t start = cpu::tick_count();
    inner_.run([&](int worker) {
      const Clocked clocked(clocks_[static_cast<std::size_t>(worker)].clock);
      task(worker);
    });
    in_runs_ += static_cast<double>(cpu::tick_count() - start);
  }

  /// One call of a problem with this executor, measured.
  void measure(Problem& problem) {
    measuring_ = true;
    const std::uint64_t start = cpu::tick_count();
    {
      const Clocked clocked(caller_);
      problem.run();
    }
    calls_ += static_cast<double>(cpu::tick_count() - start);
    measuring_ = false;
  }

  Ticks ticks() const {
    Ticks t;
    t.calls = calls_;
    t.alone = calls_ - in_runs_;
    for (std::size_t i = 1; i < kNumPhases; ++i) {
      const auto direct = static_cast<double>(caller_.ticks[i]);
      t.alone -= direct;  // a call of one unit does it on the calling thread
      t.phases[i] = direct;
      for (const Slot& s : clocks_) t.phases[i] += static_cast<double>(s.clock.ticks[i]);
    }
    return t;
  }

 private:
  /// Clocks of two workers lie on different cache lines.
  struct alignas(128) Slot {
    PhaseClock clock;
  };
  Executor& inner_;
  std::vector<Slot> clocks_;
  PhaseClock caller_;
  double calls_ = 0.0, in_runs_ = 0.0;
  bool measuring_ = false;
};

std::vector<Share> shares_of(const Ticks& t, int workers) {
  const double all = t.calls * workers;
  const auto phase = [&](Phase p) { return t.phases[static_cast<std::size_t>(p)] / all; };
  double in_kernels = 0.0;
  for (const double ticks : t.phases) in_kernels += ticks;
  if (in_kernels == 0.0) return {};
  std::vector<Share> shares = {{"queries and outputs", phase(Phase::rows)},
                               {"pack", phase(Phase::pack)},
                               {"QK", phase(Phase::qk)},
                               {"softmax", phase(Phase::softmax)},
                               {"PV", phase(Phase::pv)},
                               {"merge", phase(Phase::merge)}};
  const double set_up = t.alone / t.calls;
  double waiting = 1.0 - set_up;
  for (const Share& s : shares) waiting -= s.share;
  shares.push_back({"waiting (start, imbalance)", waiting});
  shares.push_back({"set-up of the call", set_up});
  return shares;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// One attempt.
Explanation measure(Problem& problem, Executor& inner, ClockedExecutor& executor, double seconds) {
  constexpr int kMinRuns = 7;
  constexpr double kSpin = 0.05;
  Explanation e;
  SpinChecks spin(inner);
  spin.look(kSpin);
  const Ticks before = executor.ticks();
  for (; e.runs < kMinRuns || e.seconds < seconds; ++e.runs) {
    auto start = std::chrono::steady_clock::now();
    problem.run();
    e.seconds_plain += seconds_since(start);
    start = std::chrono::steady_clock::now();
    executor.measure(problem);
    e.seconds += seconds_since(start);
    spin.look_now_and_then();
  }
  spin.look(kSpin);
  Ticks t = executor.ticks();
  for (std::size_t i = 0; i < kNumPhases; ++i) t.phases[i] -= before.phases[i];
  t.calls -= before.calls;
  t.alone -= before.alone;
  e.shares = shares_of(t, inner.num_workers());
  e.seconds /= e.runs;
  e.seconds_plain /= e.runs;
  e.lost_fraction = spin.lost_fraction();
  return e;
}

}  // namespace

Explanation explain_case(const Case& c, Executor& shared, const Timing& timing) {
  const auto own = own_pool(c, shared);
  Executor& inner = own ? *own : shared;
  ClockedExecutor executor(inner);
  const auto problem = c.make(executor);
  problem->run();
  Explanation e;
  e.failure = problem->verify();
  if (e.failure.empty())
    e = quietest(timing.attempts,
                 [&] { return measure(*problem, inner, executor, timing.seconds); });
  e.name = c.name;
  e.threads = inner.num_workers();
  e.model = problem->estimate();
  return e;
}

}  // namespace attend::bench
