// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <exception>
#include <iterator>

#include "attend/core/error.h"

namespace attend::conformance {
namespace {

constexpr std::size_t kMaxFailuresPerRow = 10;

/// Shell-style match: * any run of characters, ? any one.
bool matches(std::string_view pattern, std::string_view text) {
  if (pattern.empty()) return text.empty();
  if (pattern.front() == '*') {
    return matches(pattern.substr(1), text) || (!text.empty() && matches(pattern, text.substr(1)));
  }
  if (text.empty() || (pattern.front() != '?' && pattern.front() != text.front())) return false;
  return matches(pattern.substr(1), text.substr(1));
}

std::vector<const Op*> chosen_ops(const std::vector<std::string>& patterns, Arithmetic arithmetic) {
  std::vector<const Op*> possible, chosen;
  for (const Op& op : ops())
    if (arithmetic == Arithmetic::automatic || op.has_arithmetic) possible.push_back(&op);
  for (const Op* op : possible) {
    const bool wanted =
        patterns.empty() || std::any_of(patterns.begin(), patterns.end(),
                                        [&](const auto& p) { return matches(p, op->name); });
    if (wanted) chosen.push_back(op);
  }
  for (const std::string& pattern : patterns) {
    const bool known = std::any_of(possible.begin(), possible.end(),
                                   [&](const Op* op) { return matches(pattern, op->name); });
    if (known) continue;
    std::vector<std::string> names;
    for (const Op* op : possible) names.push_back(op->name);
    throw InvalidArgument("check", "op", fmt::format("one of {}", fmt::join(names, ", ")),
                          fmt::format("'{}'", pattern));
  }
  return chosen;
}

std::vector<IsaLevel> chosen_levels(const std::vector<IsaLevel>& wanted) {
  const std::vector<IsaLevel> available = available_isa_levels();
  for (const IsaLevel level : wanted) {
    if (std::find(available.begin(), available.end(), level) != available.end()) continue;
    throw Unsupported(
        fmt::format("checks on level {}", to_string(level)),
        {fmt::format("this machine's best level is {}", to_string(available.back()))});
  }
  return wanted.empty() ? available : wanted;
}

bool has_fast_kernels(IsaLevel level) {
  return std::any_of(kKernelKinds.begin(), kKernelKinds.end(),
                     [&](KernelKind kind) { return has_fast_kernel(level, kind); });
}

/// Levels on which an op runs.
std::vector<IsaLevel> levels_of(const Op& op, const std::vector<IsaLevel>& levels,
                                Arithmetic arithmetic) {
  const std::vector<IsaLevel> possible =
      op.every_isa ? levels : std::vector<IsaLevel>{active_isa()};
  std::vector<IsaLevel> chosen;
  std::copy_if(possible.begin(), possible.end(), std::back_inserter(chosen), [&](IsaLevel level) {
    return arithmetic != Arithmetic::fast || has_fast_kernels(level);
  });
  return chosen;
}

bool can_run(const Op& op, const Case& c, const KernelOptions& kernels) {
  if (kernels.arithmetic == Arithmetic::automatic) return true;
  const std::optional<KernelKind> kind = c.kind();
  if (!kind) return false;
  const IsaLevel level = op.every_isa ? *kernels.isa : kernel_choice().level(*kind);
  return is_served(kernels.arithmetic, level, *kind);
}

/// One to three workers, by turns: results may not depend on it.
Executor& executor_for(int case_index) {
  static const std::array<std::unique_ptr<Executor>, 3> pools{
      make_thread_pool(1), make_thread_pool(2), make_thread_pool(3)};
  return *pools[static_cast<std::size_t>(case_index) % pools.size()];
}

Outcome run_guarded(Case& c, const KernelOptions& kernels, int case_index) {
  try {
    return c.run(kernels, executor_for(case_index));
  } catch (const std::exception& e) {
    Outcome outcome;
    outcome.fail(fmt::format("threw: {}", e.what()));
    return outcome;
  }
}

std::string repeat_command(const Op& op, const CheckOptions& options, int case_index,
                           IsaLevel isa) {
  std::string common =
      fmt::format("attend check --op {} --seed {} --case {}", op.name, options.seed, case_index);
  if (options.arithmetic != Arithmetic::automatic)
    common += fmt::format(" --arithmetic {}", to_string(options.arithmetic));
  if (op.every_isa) return fmt::format("{} --isa {}", common, to_string(isa));
  return fmt::format("ATTEND_ISA={} {}", to_string(isa), common);
}

void record(CheckReport& report, std::size_t row_index, const Outcome& outcome,
            const std::function<CheckFailure()>& failure) {
  CheckRow& row = report.rows[row_index];
  ++row.cases;
  row.worst_error = std::max(row.worst_error, outcome.worst_error);
  row.worst_ratio = std::max(row.worst_ratio, outcome.worst_ratio);
  if (!outcome.failed()) return;
  ++row.failed;
  const auto reported =
      std::count_if(report.failures.begin(), report.failures.end(),
                    [&](const CheckFailure& f) { return f.op == row.op && f.isa == row.isa; });
  if (static_cast<std::size_t>(reported) < kMaxFailuresPerRow) report.failures.push_back(failure());
}

void check_op(const Op& op, const CheckOptions& options, const std::vector<IsaLevel>& levels,
              const std::function<void()>& done, CheckReport& report) {
  const std::size_t first_row = report.rows.size();
  for (const IsaLevel level : levels) report.rows.push_back({op.name, level});
  const int begin = options.only_case.value_or(0);
  const int end = options.only_case ? begin + 1 : options.cases;
  for (int index = begin; index < end; ++index) {
    Rng rng(options.seed, op.name, index);
    const std::unique_ptr<Case> c = op.make_case(rng);
    for (std::size_t i = 0; i < levels.size(); ++i) {
      const KernelOptions kernels(levels[i], options.arithmetic);
      if (can_run(op, *c, kernels)) {
        const Outcome outcome = run_guarded(*c, kernels, index);
        record(report, first_row + i, outcome, [&] {
          return CheckFailure{op.name,         levels[i],
                              index,           c->describe(),
                              outcome.failure, repeat_command(op, options, index, levels[i])};
        });
      }
      done();
    }
  }
}

}  // namespace

CheckReport run_checks(const CheckOptions& options) {
  const std::vector<const Op*> chosen = chosen_ops(options.ops, options.arithmetic);
  const std::vector<IsaLevel> levels = chosen_levels(options.levels);
  std::size_t rows = 0;
  for (const Op* op : chosen) rows += levels_of(*op, levels, options.arithmetic).size();
  if (rows == 0) {
    throw Unsupported(fmt::format("checks of {} arithmetic", to_string(options.arithmetic)),
                      {"none of the chosen levels has kernels for it; amx has"});
  }
  const int total = static_cast<int>(rows) * (options.only_case ? 1 : options.cases);
  int finished = 0;
  CheckReport report;
  for (const Op* op : chosen) {
    const auto done = [&] {
      ++finished;
      if (options.progress) options.progress(finished, total, op->name);
    };
    check_op(*op, options, levels_of(*op, levels, options.arithmetic), done, report);
  }
  return report;
}

}  // namespace attend::conformance
