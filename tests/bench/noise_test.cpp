// SPDX-License-Identifier: Apache-2.0
#include "bench/noise.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace attend::testing {
namespace {

using bench::kNoisyAbove;

struct Result {
  double lost_fraction = 0.0;
  int attempts = 0;
};

/// The quietest of measurements that lose `lost`, one after the other.
Result quietest_of(int most, const std::vector<double>& lost) {
  std::size_t next = 0;
  return bench::quietest(most, [&] { return Result{lost.at(next++)}; });
}

TEST(NoiseGate, AQuietMeasurementIsNotRepeated) {
  const Result r = quietest_of(3, {kNoisyAbove});
  EXPECT_EQ(r.lost_fraction, kNoisyAbove);
  EXPECT_EQ(r.attempts, 1);
}

TEST(NoiseGate, RepeatsUntilItIsQuiet) {
  const Result r = quietest_of(3, {0.5, 0.01, 0.0});
  EXPECT_EQ(r.lost_fraction, 0.01);
  EXPECT_EQ(r.attempts, 2);
}

TEST(NoiseGate, TheQuietestOfNoisyOnesCounts) {
  const Result r = quietest_of(3, {0.5, 0.1, 0.3});
  EXPECT_EQ(r.lost_fraction, 0.1);
  EXPECT_EQ(r.attempts, 3);
}

TEST(NoiseGate, SpinningSeesOtherThreads) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (int i = 0; i < 3 * available_cpus(); ++i)
    others.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {
      }
    });
  const auto executor = make_thread_pool(2);
  bench::SpinChecks spin(*executor);
  EXPECT_EQ(spin.lost_fraction(), 0.0);
  spin.look(0.2);
  spin.look(0.1);
  stop = true;
  for (std::thread& t : others) t.join();
  EXPECT_GT(spin.lost_fraction(), kNoisyAbove);
  EXPECT_LE(spin.lost_fraction(), 1.0);
}

}  // namespace
}  // namespace attend::testing
