// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "attend/core/cpu.h"
#include "bench/ceilings.h"
#include "bench/noise.h"
#include "bench/peers/attend_side.h"

/// Our side of scripts/peers, a line at a time, so that the other side's runs can alternate with
/// ours. Each command has one line of answer:
///   run SECONDS        at least one run and that long: "ms MEDIAN RUNS"
///   dump FILE          writes the output of the last run as float32: "ok"
///   spin SECONDS       share of the time that other programs took: "lost FRACTION"
///   ceilings           "ceilings FMA_GFLOPS BF16_DOT_GFLOPS INT8_DOT_GOPS READ_GBPS"
namespace attend::bench {
namespace {

constexpr double kWarmUpBelow = 0.02;  // s; longer runs do not gain from a run before them
constexpr std::size_t kReadBuffer = std::size_t{512} << 20;

double seconds_of_run(AttendSide& side) {
  const auto start = std::chrono::steady_clock::now();
  side.run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string timed_runs(AttendSide& side, double seconds) {
  std::vector<double> times = {seconds_of_run(side)};
  if (times[0] < kWarmUpBelow) times.clear();
  double total = 0.0;
  while (times.empty() || total < seconds) {
    times.push_back(seconds_of_run(side));
    total += times.back();
  }
  std::sort(times.begin(), times.end());
  return fmt::format("ms {} {}", 1e3 * times[times.size() / 2], times.size());
}

std::string answer(const std::string& line, AttendSide& side, Executor& executor) {
  std::istringstream in(line);
  std::string command, file;
  double seconds = 0.0;
  in >> command;
  if (command == "dump" && in >> file) {
    side.write_output(file);
    return "ok";
  }
  if (command == "run" && in >> seconds) return timed_runs(side, seconds);
  if (command == "spin" && in >> seconds)
    return fmt::format("lost {}", measure_lost_fraction(executor, seconds));
  if (command == "ceilings") {
    const Ceilings c = measure_ceilings(executor, kReadBuffer, 0.3);
    return fmt::format("ceilings {} {} {} {}", c.fma_gflops, c.bf16_dot_gflops, c.int8_dot_gops,
                       c.read_gbps);
  }
  return "failed unknown command '" + line + "'";
}

int serve(const std::string& problem, int threads) {
  const auto executor = make_thread_pool(threads);
  AttendSide side(read_peer_problem(problem), *executor);
  fmt::print("ready {} {}\n", ATTEND_VERSION, to_string(active_isa()));
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    fmt::print("{}\n", answer(line, side, *executor));
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace attend::bench

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs(
        "usage: attend_peer PROBLEM.json THREADS\n"
        "Runs one problem on command; started by scripts/peers, which writes the problem.\n",
        stderr);
    return 2;
  }
  try {
    return attend::bench::serve(argv[1], std::atoi(argv[2]));
  } catch (const std::exception& e) {
    std::printf("failed %s\n", e.what());
    return 1;
  }
}
