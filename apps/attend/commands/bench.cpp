// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fnmatch.h>

#include <algorithm>
#include <cstdio>

#include "attend/core/cpu.h"
#include "attend/core/error.h"
#include "bench/harness.h"
#include "cli.h"
#include "explain_report.h"

namespace attend::cli {
namespace {

using bench::Bound;
using bench::CaseResult;
using bench::Speed;
using nlohmann::ordered_json;

struct BenchOptions {
  std::string pattern = "*";
  std::string json;
  std::string explain;
  int threads = 0;
  bench::Timing timing;
  bool list = false;
};

constexpr int kNameWidth = 37;
constexpr std::size_t kReadBuffer = std::size_t{512} << 20;

ordered_json to_json(const bench::Ceilings& c, Executor& executor) {
  return {{"fma_gflops", c.fma_gflops},       {"bf16_dot_gflops", c.bf16_dot_gflops},
          {"int8_dot_gops", c.int8_dot_gops}, {"read_gbps", c.read_gbps},
          {"run_read_gbps", c.run_read_gbps}, {"run_bytes", bench::kRunBytes},
          {"lost_fraction", c.lost_fraction}, {"noisy", c.lost_fraction > bench::kNoisyAbove},
          {"attempts", c.attempts},           {"threads", executor.num_workers()}};
}

/// `name` stands in front: "case" or "part".
ordered_json to_json(const char* name, const std::string& value, const Speed& s) {
  return {{name, value},
          {"seconds", s.seconds},
          {"gflops", s.gflops},
          {"gbps", s.gbps},
          {"bound", bench::to_string(s.bound)},
          {"share", s.share},
          {"ceiling", s.ceiling},
          {"seconds_min", s.seconds_min}};
}

ordered_json to_json(const CaseResult& r) {
  ordered_json j = to_json("case", r.name, r.speed);
  j["verified"] = r.verified;
  if (!r.verified) j["failure"] = r.failure;
  j["threads"] = r.threads;
  j["runs"] = r.runs;
  j["lost_fraction"] = r.lost_fraction;
  j["noisy"] = r.noisy();
  j["attempts"] = r.attempts;
  if (r.parts_over_whole > 0.0) j["parts_over_whole"] = r.parts_over_whole;
  for (const auto& part : r.parts) {
    if (!part.ratio_name.empty()) j[part.ratio_name] = part.ratio;
    j["parts"].push_back(to_json("part", part.name, part.speed));
  }
  return j;
}

std::string format_seconds(double s) {
  return s < 1e-3 ? fmt::format("{:.1f} us", s * 1e6) : fmt::format("{:.2f} ms", s * 1e3);
}

const char* unit_of(Bound bound) {
  switch (bound) {
    case Bound::compute:
      return "GFLOP/s";
    case Bound::int8_compute:
      return "int8 GOP/s";
    case Bound::indexer_compute:
    case Bound::indexer:
      return active_isa() >= IsaLevel::amx ? "GFLOP/s in bf16 tiles" : "GFLOP/s";
    case Bound::memory:
      return "GB/s";
    case Bound::parts:
      return "GFLOP/s, its parts one after the other";
  }
  return "";
}

void print_speed(std::FILE* to, const std::string& name, const Speed& s, const std::string& mark) {
  fmt::print(to, "{:<{}} {:>10} {:>10.1f} {:>9.2f}  {:>5.1f} % of {:.0f} {}{}\n", name, kNameWidth,
             format_seconds(s.seconds), s.gflops, s.gbps, 100 * s.share, s.ceiling,
             unit_of(s.bound), mark);
}

void print_case(std::FILE* to, const CaseResult& r) {
  if (!r.verified) {
    fmt::print(to, "{:<{}} WRONG, not timed: {}\n", r.name, kNameWidth, r.failure);
    return;
  }
  const std::string mark =
      r.noisy() ? fmt::format("  (noisy: {:.0f} % lost to others)", 100 * r.lost_fraction) : "";
  print_speed(to, r.name, r.speed, mark);
  for (const auto& part : r.parts)
    print_speed(
        to, "  " + part.name, part.speed,
        part.ratio_name.empty() ? "" : fmt::format("  {} {:.2f}", part.ratio_name, part.ratio));
  if (r.parts_over_whole > 0.0)
    fmt::print(to, "  {:.1f} times as fast as that\n", r.parts_over_whole);
  std::fflush(to);
}

void print_ceilings(std::FILE* to, const bench::Ceilings& c, const Executor& executor) {
  fmt::print(
      to,
      "ceilings with {} thread(s): float32 FMA {:.0f} GFLOP/s, bf16 dot {:.0f} GFLOP/s, int8 dot "
      "{:.0f} GOP/s, read {:.1f} GB/s, shuffled runs of 8 KiB {:.1f} GB/s; lost to others {:.1f} "
      "%{}\n",
      executor.num_workers(), c.fma_gflops, c.bf16_dot_gflops, c.int8_dot_gops, c.read_gbps,
      c.run_read_gbps, 100 * c.lost_fraction,
      c.lost_fraction > bench::kNoisyAbove ? " (noisy: repeat on a quiet machine)" : "");
}

std::vector<bench::Case> cases_of(const char* option, const std::string& pattern) {
  std::vector<bench::Case> chosen;
  for (auto& c : bench::all_cases())
    if (fnmatch(pattern.c_str(), c.name.c_str(), 0) == 0) chosen.push_back(std::move(c));
  if (chosen.empty())
    throw InvalidArgument("attend bench", option, "a pattern that matches a case of --list",
                          "'" + pattern + "'");
  return chosen;
}

void explain(const BenchOptions& o, Executor& executor, std::FILE* text) {
  ordered_json results = ordered_json::array();
  bool all_verified = true;
  for (const auto& c : cases_of("--explain", o.explain)) {
    const bench::Explanation e = bench::explain_case(c, executor, o.timing);
    print_explanation(text, e);
    results.push_back(explanation_json(e));
    all_verified &= e.failure.empty();
  }
  write_json({{"explanations", results}}, o.json);
  if (!all_verified) throw Exit{kCheckFailed};
}

void run(const BenchOptions& o) {
  const std::vector<bench::Case> chosen = cases_of("--case", o.pattern);
  if (o.list) {
    for (const auto& c : chosen) fmt::print("{:<{}} {}\n", c.name, kNameWidth, c.description);
    return;
  }
  const auto own = o.threads > 0 ? make_thread_pool(o.threads) : nullptr;
  Executor& executor = own ? *own : default_executor();
  std::FILE* text = o.json == "-" ? stderr : stdout;
  if (!o.explain.empty()) {
    explain(o, executor, text);
    return;
  }

  const bench::Ceilings ceilings = bench::quietest(
      o.timing.attempts, [&] { return bench::measure_ceilings(executor, kReadBuffer, 0.3); });
  print_ceilings(text, ceilings, executor);
  fmt::print(text, "{:<{}} {:>10} {:>10} {:>9}  {}\n", "case", kNameWidth, "time", "GFLOP/s",
             "GB/s", "share of the ceiling that binds");
  ordered_json results = ordered_json::array();
  bool all_verified = true;
  int noisy = 0;
  for (const auto& c : chosen) {
    const CaseResult r = bench::run_case(c, executor, o.timing);
    print_case(text, r);
    results.push_back(to_json(r));
    all_verified &= r.verified;
    noisy += r.noisy() ? 1 : 0;
  }
  if (noisy > 0)
    fmt::print(text,
               "{} of {} cases are noisy, measured {} time(s): repeat them on a quiet machine\n",
               noisy, chosen.size(), o.timing.attempts);
  write_json({{"ceilings", to_json(ceilings, executor)},
              {"cases", results},
              {"noisy", noisy > 0 || ceilings.lost_fraction > bench::kNoisyAbove}},
             o.json);
  if (!all_verified) throw Exit{kCheckFailed};
}

}  // namespace

void add_bench(CLI::App& app) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App* command = app.add_subcommand(
      "bench",
      "Measure speed as a share of what this machine can do.\n\n"
      "First the ceilings (arithmetic in registers, sequential reads, and reads of runs in "
      "shuffled\n"
      "places, which a cache of small blocks allows), then each case: it is compared with the\n"
      "float64 oracle on sampled rows, and only a right result is timed. The\n"
      "ceiling that binds the case is measured again beside it, over a buffer as large as the\n"
      "case's data (at most 2 GB). A batch of several kinds of requests is measured against the\n"
      "sum of its parts, each run by itself. Differential attention is measured beside four calls "
      "of plain\n"
      "attention that make up a layer, and beside plain attention with as many heads.\n\n"
      "Threads spin before, between and after the runs. If other programs took more than 2 % of\n"
      "that time, the measurement is repeated, and marked noisy if it stays so.\n\n"
      "--explain gives the kernels clocks: the time of packing, QK, softmax, PV, merging partial\n"
      "results and waiting (imbalance), beside what the cost model of plans expects. What is "
      "packed\n"
      "inside of a multiplication counts as that; waiting for memory counts where it happens.\n\n"
      "Examples:\n  attend bench --list\n  attend bench --case 'decode*' --json -\n"
      "  attend bench --explain decode_bf16_64x512");
  command->add_option("--case", o->pattern, "Cases to run, a shell pattern (default: all)");
  command->add_option("--threads", o->threads, "Threads (default: all CPUs this process may use)")
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--seconds", o->timing.seconds,
                   "Seconds to time each case at least (default 0.5)")
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--attempts", o->timing.attempts,
                   "Times to measure what is noisy, at most (default 3)")
      ->check(CLI::PositiveNumber);
  command->add_option("--explain", o->explain,
                      "Print where the time of these cases goes, a shell pattern, and end");
  command->add_flag("--list", o->list, "List the cases and end");
  add_json_option(*command, o->json);
  command->callback([o] { run(*o); });
}

}  // namespace attend::cli
