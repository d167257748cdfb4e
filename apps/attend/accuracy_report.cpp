// SPDX-License-Identifier: Apache-2.0
// attend report accuracy: what the schemes of quantisation cost on data with outliers.
#include "accuracy_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <string>

#include "cli.h"
#include "conformance/accuracy.h"
#include "progress.h"

namespace attend::cli {
namespace {

using conformance::AccuracyReport;
using nlohmann::ordered_json;

struct Options {
  conformance::AccuracyOptions accuracy;
  std::string json_path;
};

constexpr std::string_view kHelp = R"(
Each figure is sum |O - O'| / sum |O|: O is float64 attention, O' the same on codes and scales.
Absolute errors depend on the data, so compare figures of one column.

Data (no model needed; made from the seed, with values that bf16 holds):
  G0 iid       N(0, 1) everywhere: for orientation, no scheme stands out
  G1 outliers  one value in 1000 has N(0, 100) added
  G2 channels  4 pairs of key channels have a mean of about +-12; tokens of the values differ in size
  G3 rotated   G2 after rotary embedding: the large channels turn with the position
  G4 sink      the first key is large in one channel and takes about 0.6 of the softmax

Schemes ('K' = only keys are quantised, 'KV' = keys and values):
  per tensor, per token          one scale for all keys, or one a key
  per channel                    one scale for 64 consecutive keys of a channel
  smooth                         the mean of all keys is subtracted, then per token
  level 1                        queries and keys per token, values per channel, weights in int8
  level 2                        queries and keys per token
  K smooth                       the same after the mean of all keys was subtracted

The second table runs the ops that exist: their error, and how many times the error of float64
arithmetic on the same codes that is. More than 1.2 is a failure.

Examples:
  attend report accuracy
  attend report accuracy --keys 1024 --seed 7 --json accuracy.json

Exit code: 0 done, 1 an op adds too much error, 2 bad option.
)";

ordered_json to_json(const AccuracyReport& report, const Options& options) {
  const conformance::DataShape& shape = options.accuracy.shape;
  ordered_json j = {{"queries", shape.queries},
                    {"keys", shape.keys},
                    {"head_size", shape.head_size},
                    {"seed", options.accuracy.seed}};
  j["schemes"] = ordered_json::array();
  for (const auto& s : report.schemes) {
    j["schemes"].push_back(
        {{"data", to_string(s.data)}, {"scheme", s.scheme}, {"relative_l1", s.error}});
  }
  j["ops"] = ordered_json::array();
  for (const auto& o : report.ops) {
    j["ops"].push_back({{"data", to_string(o.data)},
                        {"op", o.op},
                        {"scheme", o.scheme},
                        {"isa", to_string(o.isa)},
                        {"relative_l1", o.error},
                        {"over_arithmetic", o.over_arithmetic}});
  }
  return j;
}

void print_header(std::FILE* to, std::string_view title) {
  fmt::print(to, "{:<48}", title);
  for (const auto kind : conformance::kDataKinds) fmt::print(to, "{:>17}", to_string(kind));
  fmt::print(to, "\n");
}

void print(const AccuracyReport& report, std::FILE* to) {
  print_header(to, "scheme");
  for (const auto& scheme : conformance::quant_schemes()) {
    fmt::print(to, "{:<48}", scheme.name);
    for (const auto kind : conformance::kDataKinds) {
      fmt::print(to, "{:>17.4f}", report.error(kind, scheme.name));
    }
    fmt::print(to, "\n");
  }
  fmt::print(to, "\n");
  print_header(
      to, fmt::format("op on {} (error, times its scheme's)", to_string(report.ops.front().isa)));
  for (const auto& op : conformance::quantised_ops()) {
    fmt::print(to, "{:<48}", fmt::format("{}, {}", op.name, op.scheme));
    for (const auto& o : report.ops) {
      if (o.op != op.name || o.scheme != op.scheme) continue;
      fmt::print(to, "{:>17}", fmt::format("{:.4f} {:.3f}x", o.error, o.over_arithmetic));
    }
    fmt::print(to, "\n");
  }
}

void run(Options options) {
  Progress progress;
  options.accuracy.progress = [&](int done, int total, std::string_view what) {
    progress.update(static_cast<double>(done) / total, what);
  };
  const AccuracyReport report = conformance::measure_accuracy(options.accuracy);
  progress.clear();
  print(report, options.json_path == "-" ? stderr : stdout);
  write_json(to_json(report, options), options.json_path);
  if (!std::all_of(report.ops.begin(), report.ops.end(),
                   [](const auto& o) { return o.passed(); })) {
    throw Exit{kCheckFailed};
  }
}

}  // namespace

void add_accuracy_report(CLI::App& report) {
  CLI::App* command = report.add_subcommand(
      "accuracy", "Errors of quantised attention by scheme and kind of data, in float64");
  const auto options = std::make_shared<Options>();
  conformance::DataShape& shape = options->accuracy.shape;
  const auto option = [&](const char* name, auto& value, const char* help, const char* type) {
    command->add_option(name, value, help)->type_name(type)->capture_default_str();
  };
  option("--keys", shape.keys, "Keys, all visible to every query", "N");
  option("--queries", shape.queries, "Queries of one head", "N");
  option("--head-size", shape.head_size, "Elements of a head, a multiple of 8 up to 256", "D");
  option("--seed", options->accuracy.seed, "The same seed gives the same data", "S");
  add_json_option(*command, options->json_path);
  command->footer(std::string(kHelp));
  command->callback([options] { run(*options); });
}

}  // namespace attend::cli
