// SPDX-License-Identifier: Apache-2.0
// attend check: random problems of every op and back end against the float64 oracle.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "cli.h"
#include "conformance/check.h"

namespace attend::cli {
namespace {

struct CheckOptions {
  int cases = 200;
  std::uint64_t seed = 1;
  std::vector<std::string> ops;
  std::string isa = "all";
  std::string arithmetic = "automatic";
  int only_case = -1;
  std::string json_path;
};

conformance::CheckOptions parse(const CheckOptions& options) {
  conformance::CheckOptions check;
  check.cases = options.cases;
  check.seed = options.seed;
  check.ops = options.ops;
  if (options.only_case >= 0) check.only_case = options.only_case;
  const auto arithmetic = parse_arithmetic(options.arithmetic);
  if (!arithmetic) {
    throw InvalidArgument("check", "--arithmetic", "automatic, exact or fast",
                          fmt::format("'{}'", options.arithmetic));
  }
  check.arithmetic = *arithmetic;
  if (options.isa == "all") return check;
  const auto level = parse_isa(options.isa);
  if (!level) {
    std::vector<std::string_view> names{"all"};
    for (const IsaLevel l : available_isa_levels()) names.push_back(to_string(l));
    throw InvalidArgument("check", "--isa", fmt::format("one of {}", fmt::join(names, ", ")),
                          fmt::format("'{}'", options.isa));
  }
  check.levels = {*level};
  return check;
}

/// One line that is drawn over itself.
void show_progress(int done, int total, std::string_view op) {
  constexpr int kWidth = 30;
  const int filled = total > 0 ? done * kWidth / total : kWidth;
  fmt::print(stderr, "\r[{:<{}}] {}/{} {:<28}", std::string(static_cast<std::size_t>(filled), '#'),
             kWidth, done, total, op);
  if (done == total) fmt::print(stderr, "\r{:80}\r", "");
  std::fflush(stderr);
}

nlohmann::ordered_json as_json(const conformance::CheckReport& report, const CheckOptions& options,
                               const std::vector<std::string>& uncovered) {
  nlohmann::ordered_json j;
  j["seed"] = options.seed;
  j["arithmetic"] = options.arithmetic;
  j["results"] = nlohmann::ordered_json::array();
  for (const conformance::CheckRow& row : report.rows) {
    j["results"].push_back({{"op", row.op},
                            {"isa", to_string(row.isa)},
                            {"cases", row.cases},
                            {"failed", row.failed},
                            {"worst_error", row.worst_error},
                            {"worst_ratio_to_bound", row.worst_ratio}});
  }
  j["failures"] = nlohmann::ordered_json::array();
  for (const conformance::CheckFailure& f : report.failures) {
    j["failures"].push_back({{"op", f.op},
                             {"isa", to_string(f.isa)},
                             {"case", f.case_index},
                             {"problem", f.problem},
                             {"message", f.message},
                             {"command", f.command}});
  }
  j["backends_without_cases"] = uncovered;
  return j;
}

void print(const conformance::CheckReport& report, const std::vector<std::string>& uncovered) {
  fmt::print("{:<28} {:<12} {:>6} {:>7} {:>12} {:>18}\n", "op", "isa", "cases", "failed",
             "worst error", "worst error/bound");
  for (const conformance::CheckRow& row : report.rows) {
    fmt::print("{:<28} {:<12} {:>6} {:>7} {:>12.3g} {:>18.3g}\n", row.op, to_string(row.isa),
               row.cases, row.failed, row.worst_error, row.worst_ratio);
  }
  for (const conformance::CheckFailure& f : report.failures) {
    fmt::print("\nFAILED {} on {}, case {}\n  problem: {}\n  result:  {}\n  repeat:  {}\n", f.op,
               to_string(f.isa), f.case_index, f.problem, f.message, f.command);
  }
  for (const std::string& name : uncovered) {
    fmt::print("\nFAILED back end {} has no cases: add one to src/conformance/cases\n", name);
  }
}

void add_options(CLI::App& command, CheckOptions& o) {
  command.add_option("--cases", o.cases, "Random problems per op and ISA level")
      ->type_name("N")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  command.add_option("--seed", o.seed, "The same seed gives the same problems")
      ->type_name("S")
      ->capture_default_str();
  command.add_option("--op", o.ops, "Ops to check, with * and ?, separated by commas; unset = all")
      ->type_name("GLOB")
      ->delimiter(',');
  command.add_option("--isa", o.isa, "Level to check, or all that this machine has")
      ->type_name("LEVEL")
      ->capture_default_str();
  command
      .add_option("--arithmetic", o.arithmetic,
                  "automatic, exact or fast; the last two run what has a choice, and nothing else")
      ->type_name("A")
      ->capture_default_str();
  command.add_option("--case", o.only_case, "Run only the problem of this number")
      ->type_name("I")
      ->check(CLI::NonNegativeNumber);
  add_json_option(command, o.json_path);
}

std::string help_of_checks() {
  std::string text =
      "Every problem is random in shape, features and memory layout; whatever an op may not read\n"
      "is NaN, and whatever it may not write is watched. Results are compared with a float64\n"
      "oracle, within a bound that is derived (docs/numerics.md), never tuned. Ops without a\n"
      "choice of ISA level run on the active one (see ATTEND_ISA). Automatic arithmetic is fast\n"
      "(products of bf16 tiles) where a level has it, else exact (float32 products). Exit code 0:\n"
      "all passed, 1: some failed, 2: wrong usage.\n\nOps:\n";
  for (const conformance::Op& op : conformance::ops()) text += fmt::format("  {}\n", op.name);
  return text +
         "\nExamples:\n  attend check\n"
         "  attend check --op 'flash_attn*' --isa avx2 --cases 1000 --seed 7\n"
         "  attend check --op 'backend*' --arithmetic exact";
}

}  // namespace

void add_check(CLI::App& app) {
  auto options = std::make_shared<CheckOptions>();
  CLI::App* command = app.add_subcommand(
      "check", "Check every op and back end of this machine against a float64 oracle");
  command->footer(help_of_checks);
  add_options(*command, *options);
  command->callback([options] {
    conformance::CheckOptions check = parse(*options);
    if (isatty(STDERR_FILENO) != 0) check.progress = show_progress;
    const conformance::CheckReport report = conformance::run_checks(check);
    const std::vector<std::string> uncovered =
        options->ops.empty() ? conformance::uncovered_backends() : std::vector<std::string>{};
    if (options->json_path != "-") print(report, uncovered);
    write_json(as_json(report, *options, uncovered), options->json_path);
    if (!report.failures.empty() || !uncovered.empty()) throw Exit{kCheckFailed};
  });
}

}  // namespace attend::cli
