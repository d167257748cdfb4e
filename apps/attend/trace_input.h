// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "serving/trace.h"

/// The trace that a subcommand works on, and the words about it that all of them share.
namespace attend::cli {

struct TraceInput {
  std::string name;  ///< a file, or synthetic[:key=value,...]
  std::optional<std::int64_t> limit;
  double scale_lengths = 1.0;
};

/// Adds TRACE, --limit and --scale-lengths; returns TRACE, which the caller may make required.
CLI::Option* add_trace_options(CLI::App& command, TraceInput& input);
/// Reads or makes the trace. @throws InvalidArgument that names what is wrong with it.
serving::Trace load_trace(const TraceInput& input, std::uint64_t seed);

/// Paragraph of a --help that says what TRACE may be; begins with a newline.
extern const std::string_view kTraceHelp;
/// Paragraph that lists the model presets; begins with a newline.
std::string model_list();

}  // namespace attend::cli
