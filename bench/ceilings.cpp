// SPDX-License-Identifier: Apache-2.0
#include "bench/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <vector>

#include "attend/core/cpu.h"
#include "attend/core/workspace.h"
#include "bench/kernels/kernels.h"
#include "bench/noise.h"

namespace attend::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Operations a second of all workers together, in 1e9.
double measure_ops(Executor& executor, OpLoopFn loop, double seconds) {
  if (loop == nullptr) return 0.0;
  constexpr std::int64_t kRounds = 20000;
  std::vector<double> rates(static_cast<std::size_t>(executor.num_workers()));
  executor.run([&](int worker) {
    loop(kRounds);  // warms up the clock
    double ops = 0.0;
    const auto start = Clock::now();
    while (seconds_since(start) < seconds) ops += loop(kRounds);
    rates[static_cast<std::size_t>(worker)] = ops / seconds_since(start);
  });
  double sum = 0.0;
  for (const double r : rates) sum += r;
  return sum * 1e-9;
}

/// Offsets of all runs of a worker's memory, shuffled.
using Places = std::vector<std::size_t>;
Places shuffled_runs(std::size_t bytes) {
  Places places(bytes / kRunBytes);
  for (std::size_t i = 0; i < places.size(); ++i) places[i] = i * kRunBytes;
  std::shuffle(places.begin(), places.end(), std::mt19937_64(1));
  return places;
}

/// Median bytes a second of passes over each worker's part of a buffer, all together, in 1e9.
template <typename Pass>
double measure_passes(Executor& executor, std::size_t buffer_bytes, double seconds,
                      const Pass& pass) {
  const auto workers = static_cast<std::size_t>(executor.num_workers());
  const std::size_t share =
      std::max<std::size_t>(kRunBytes, buffer_bytes / workers / kRunBytes * kRunBytes);
  const Buffer buffer(share * workers);
  std::vector<double> rates(workers);
  executor.run([&](int worker) {
    auto* mine = static_cast<std::byte*>(buffer.data()) + static_cast<std::size_t>(worker) * share;
    std::memset(mine, worker + 1, share);
    const Places places = shuffled_runs(share);
    std::vector<double> passes;
    const auto start = Clock::now();
    // Small buffers are read many times between two looks at the clock.
    const std::size_t repeats = std::max<std::size_t>(1, (std::size_t{1} << 22) / share);
    do {
      const auto begin = Clock::now();
      for (std::size_t i = 0; i < repeats; ++i) pass(mine, share, places);
      passes.push_back(static_cast<double>(repeats * share) / seconds_since(begin));
    } while (seconds_since(start) < seconds);
    const auto middle = passes.begin() + static_cast<std::ptrdiff_t>(passes.size() / 2);
    std::nth_element(passes.begin(), middle, passes.end());
    rates[static_cast<std::size_t>(worker)] = *middle;
  });
  double sum = 0.0;
  for (const double r : rates) sum += r;
  return sum * 1e-9;
}

}  // namespace

double measure_fma_gflops(Executor& executor, double seconds) {
  return measure_ops(executor, ceiling_kernels().fma, seconds);
}

double measure_indexer_gflops(Executor& executor, double seconds) {
  const CeilingKernels kernels = ceiling_kernels();
  const bool tiles = kernels.bf16_tile != nullptr && active_isa() >= IsaLevel::amx;
  return measure_ops(executor, tiles ? kernels.bf16_tile : kernels.fma, seconds);
}

double measure_int8_gops(Executor& executor, double seconds) {
  const CeilingKernels kernels = ceiling_kernels();
  return measure_ops(executor, kernels.int8_dot != nullptr ? kernels.int8_dot : kernels.fma,
                     seconds);
}

double measure_read_gbps(Executor& executor, std::size_t buffer_bytes, double seconds) {
  const ReadLoopFn read = ceiling_kernels().read;
  return measure_passes(
      executor, buffer_bytes, seconds,
      [read](const std::byte* data, std::size_t bytes, const Places&) { read(data, bytes); });
}

double measure_run_read_gbps(Executor& executor, std::size_t buffer_bytes, double seconds) {
  const ReadLoopFn read = ceiling_kernels().read;
  const auto pass = [read](const std::byte* data, std::size_t, const Places& places) {
    constexpr std::size_t kStep = 1024;
    for (std::size_t i = 0; i < places.size(); ++i) {
      const std::byte* run = data + places[i];
      const std::byte* ahead = data + places[i + 1 < places.size() ? i + 1 : 0];
      for (std::size_t at = 0; at < kRunBytes; at += kStep) {
        for (std::size_t line = 0; line < kStep; line += 64)
          __builtin_prefetch(ahead + at + line, 0, 2);
        read(run + at, kStep);
      }
    }
  };
  return measure_passes(executor, buffer_bytes, seconds, pass);
}

Ceilings measure_ceilings(Executor& executor, std::size_t buffer_bytes, double seconds_each) {
  const CeilingKernels kernels = ceiling_kernels();
  Ceilings c;
  SpinChecks spin(executor);
  spin.look(seconds_each);
  c.fma_gflops = measure_ops(executor, kernels.fma, seconds_each);
  c.bf16_dot_gflops = measure_ops(executor, kernels.bf16_dot, seconds_each);
  c.int8_dot_gops = measure_ops(executor, kernels.int8_dot, seconds_each);
  c.read_gbps = measure_read_gbps(executor, buffer_bytes, seconds_each);
  c.run_read_gbps = measure_run_read_gbps(executor, buffer_bytes, seconds_each);
  spin.look(seconds_each);
  c.lost_fraction = spin.lost_fraction();
  return c;
}

}  // namespace attend::bench
