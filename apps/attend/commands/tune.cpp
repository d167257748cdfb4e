// SPDX-License-Identifier: Apache-2.0
// attend tune: measures which levels are fastest here and stores the choice.
#include "bench/tune.h"

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "attend/core/error.h"
#include "bench/noise.h"
#include "cli.h"
#include "plan/kernel_choice_file.h"

namespace attend::cli {
namespace {

using bench::KindTimes;
using bench::LevelTimes;
using nlohmann::ordered_json;

struct TuneOptions {
  bool dry_run = false;
  bool remove = false;
  bool force = false;
  std::string json_path;
};

constexpr std::string_view kTuneHelp = R"(
Attention in each type of keys and values is timed with the kernels of every instruction-set level that
this machine has, as a small prefill and a small decode, for about two seconds in all. The highest level
is chosen unless a lower one takes at least 5 % less time. If other programs took more than 2 % of the
time in three attempts, nothing is written and the exit code is 1, unless --force says so. Else the choice goes to
$XDG_CACHE_HOME/attend/kernels.json, or ~/.cache/attend/kernels.json, and every process of this user that
starts afterwards uses it where its caller names no level; processes that run keep their levels.

A result's bits depend on its level, so a choice changes them: machines that must agree to the bit need
the same file, none, or ATTEND_ISA, which goes before any file. A file of another version of attend or
another CPU is not used. attend info says what is used and why.

Examples:
  attend tune
  attend tune --dry-run --json -
  attend tune --remove
)";

ordered_json to_json(const bench::Tuning& tuning) {
  ordered_json kinds = ordered_json::object();
  for (const KindTimes& k : tuning.kinds) {
    ordered_json levels = ordered_json::object();
    for (const LevelTimes& t : k.levels)
      levels[std::string(to_string(t.isa))] = {{"prefill_seconds", t.prefill_seconds},
                                               {"decode_seconds", t.decode_seconds}};
    kinds[std::string(to_string(k.kind))] = {{"chosen", to_string(k.chosen)}, {"levels", levels}};
  }
  return {{"kinds", kinds},
          {"lost_fraction", tuning.lost_fraction},
          {"noisy", tuning.lost_fraction > bench::kNoisyAbove}};
}

void print(const bench::Tuning& tuning, std::FILE* to) {
  fmt::print(to, "{:<20} {:<12} {}\n", "keys and values", "chosen", "prefill + decode, ms");
  for (const KindTimes& k : tuning.kinds) {
    std::string times;
    for (const LevelTimes& t : k.levels)
      times += fmt::format("{}{} {:.2f} + {:.2f}", times.empty() ? "" : ", ", to_string(t.isa),
                           t.prefill_seconds * 1e3, t.decode_seconds * 1e3);
    fmt::print(to, "{:<20} {:<12} {}\n", to_string(k.kind), to_string(k.chosen), times);
  }
  if (tuning.lost_fraction > bench::kNoisyAbove)
    fmt::print(to, "NOISY: other programs took {:.0f} % of the time\n", 100 * tuning.lost_fraction);
}

std::filesystem::path require_path() {
  std::filesystem::path path = plan::choice_path();
  if (path.empty())
    throw Error(
        "no folder for the choice of kernels: set XDG_CACHE_HOME or HOME to an absolute path");
  return path;
}

void run(const TuneOptions& o) {
  std::FILE* to = o.json_path == "-" ? stderr : stdout;
  if (o.remove) {
    const auto path = require_path();
    std::error_code error;
    const bool removed = std::filesystem::remove(path, error);
    if (error) throw Error(fmt::format("cannot remove '{}': {}", path.string(), error.message()));
    fmt::print(to, "{} {}\n", removed ? "removed" : "there is no", path.string());
    write_json({{"removed", removed}, {"file", path.string()}}, o.json_path);
    return;
  }
  const auto path = o.dry_run ? std::filesystem::path() : require_path();
  if (!o.dry_run) plan::require_writable(path);
  const bench::Tuning tuning = bench::tune(default_executor());
  print(tuning, to);
  ordered_json j = to_json(tuning);
  j["file"] = nullptr;
  const bool refused = tuning.lost_fraction > bench::kNoisyAbove && !o.force && !o.dry_run;
  if (refused) {
    fmt::print(to, "nothing was written: repeat on a quiet machine, or with --force\n");
  } else if (!o.dry_run) {
    plan::write_choice(path, plan::this_machine(), tuning.levels());
    j["file"] = path.string();
    fmt::print(to, "written to {}\n", path.string());
    if (std::getenv("ATTEND_ISA") != nullptr)
      fmt::print(to, "ATTEND_ISA is set and goes before it\n");
  }
  write_json(j, o.json_path);
  if (refused) throw Exit{kCheckFailed};
}

}  // namespace

void add_tune(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("tune", "Find the fastest kernels of this machine and store the choice");
  const auto o = std::make_shared<TuneOptions>();
  auto* dry_run = command->add_flag("--dry-run", o->dry_run, "Measure and print, write nothing");
  command->add_flag("--remove", o->remove, "Remove the stored choice, instead of making one")
      ->excludes(dry_run);
  command->add_flag("--force", o->force, "Store what was measured on a noisy machine too")
      ->excludes(dry_run);
  add_json_option(*command, o->json_path);
  command->footer(std::string(kTuneHelp));
  command->callback([o] { run(*o); });
}

}  // namespace attend::cli
