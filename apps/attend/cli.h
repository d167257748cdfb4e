// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

namespace attend::cli {

/// Exit codes of every subcommand.
inline constexpr int kOk = 0;           ///< done, all checks passed
inline constexpr int kCheckFailed = 1;  ///< ran, but a check failed or nothing fits
inline constexpr int kBadUsage = 2;     ///< bad arguments or input; one line on stderr

/// Thrown by a subcommand to end the program with an exit code after its output is complete.
struct Exit {
  int code;
};

/// Adds the option --json to a subcommand; `path` is "" if not given, "-" for standard output.
void add_json_option(CLI::App& command, std::string& path);
/// Writes `value` to `path` ("-" = stdout, "" = nowhere). @throws Error if the file cannot be
/// written.
void write_json(const nlohmann::ordered_json& value, const std::string& path);

#define ATTEND_COMMAND(name) void add_##name(CLI::App& app);
#include "commands.inc"
#undef ATTEND_COMMAND

}  // namespace attend::cli
