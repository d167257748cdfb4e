// SPDX-License-Identifier: Apache-2.0
// attend calibrate: finds static scales of int8 values over a run and stores them.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attend/cache/value_scales.h"
#include "attend/core/error.h"
#include "attend/core/executor.h"
#include "cli.h"
#include "progress.h"
#include "serving/replay.h"
#include "trace_input.h"

namespace attend::cli {
namespace {

using nlohmann::ordered_json;

struct CalibrateOptions {
  TraceInput input;
  std::string model = "llama-3.1-8b";
  std::optional<int> num_layers;
  std::optional<int> threads;
  std::uint64_t seed = 0;
  std::string output;
  std::string show;
  std::string json_path;
};

constexpr std::string_view kCalibrateHelp = R"(
Scales of int8 keys are computed token by token. Those of values cannot be: products of weights and
value codes are summed over tokens, so one scale must hold for all tokens of a (KV head, element). It
is found beforehand. This command serves the trace without quantisation, keeps the largest magnitude
of each (layer, KV head, element) over all steps, and stores max(largest / 127, 1e-6).

The values of a replay are generated, as there are no model weights: such a file has the shape that
the model needs and suits replays of it. For a trained model an engine feeds its own values to
ValueScaleCalibration (attend/cache/value_scales.h) and gets a file of the same format:
  safetensors, one F32 tensor layers.N.value_scale [KV heads, head size] a layer
Of a model with cross attention its layers follow those of self attention.

--show reads a file, trusting nothing in it, and prints what it holds. A file that exists is replaced
by --output, whole or not at all.
)";

constexpr std::string_view kExamples = R"(
Examples:
  attend calibrate synthetic --model llama-3.1-8b --output scales.safetensors
  attend calibrate trace.csv --limit 50 --layers 4 --output scales.safetensors --json -
  attend calibrate --show scales.safetensors

Exit code: 0 done, 2 bad option, trace or file.
)";

struct Spread {
  float min = 0.0F, median = 0.0F, max = 0.0F;
};

Spread spread_of(const ValueScales& scales, int layer) {
  const ConstTensorView view = scales.layer(layer);
  std::vector<float> sorted(view.as<float>(), view.as<float>() + view.numel());
  std::sort(sorted.begin(), sorted.end());
  return {sorted.front(), sorted[sorted.size() / 2], sorted.back()};
}

ordered_json to_json(const ValueScales& scales, const std::string& path) {
  ordered_json j = {{"file", path},
                    {"num_layers", scales.num_layers},
                    {"num_kv_heads", scales.num_kv_heads},
                    {"head_size", scales.head_size}};
  j["layers"] = ordered_json::array();
  for (int layer = 0; layer < scales.num_layers; ++layer) {
    const Spread s = spread_of(scales, layer);
    j["layers"].push_back({{"min", s.min}, {"median", s.median}, {"max", s.max}});
  }
  return j;
}

void print(const ValueScales& scales, const std::string& path, std::FILE* to) {
  fmt::print(to, "{}: {} layer{} of {} kv heads x {} elements\n", path, scales.num_layers,
             scales.num_layers == 1 ? "" : "s", scales.num_kv_heads, scales.head_size);
  fmt::print(to, "{:<8}{:>14}{:>14}{:>14}\n", "layer", "smallest", "median", "largest");
  for (int layer = 0; layer < scales.num_layers; ++layer) {
    const Spread s = spread_of(scales, layer);
    fmt::print(to, "{:<8}{:>14.6g}{:>14.6g}{:>14.6g}\n", layer, s.min, s.median, s.max);
  }
}

/// Better to hear it before the run than after.
void require_writable(const std::string& path) {
  std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (folder.empty()) folder = ".";
  if (access(folder.c_str(), W_OK) != 0) {
    throw InvalidArgument("calibrate", "--output", "a file in a folder that can be written",
                          fmt::format("'{}'", path));
  }
}

ordered_json calibrate(const CalibrateOptions& o, std::FILE* to) {
  require_writable(o.output);
  serving::ReplayConfig config;
  const serving::ModelPreset& model = serving::find_model(o.model);
  config.model = &model;
  config.num_layers = o.num_layers.value_or(model.num_layers);
  config.seed = o.seed;
  const int num_caches = model.num_caches(config.num_layers);
  if (model.is_encoder()) {
    throw InvalidArgument("calibrate", "--model", "a model with a cache",
                          fmt::format("'{}'", o.model));
  }
  if (model.mla) {
    throw InvalidArgument("calibrate", "--model", "a model whose cache holds values, no latents",
                          fmt::format("'{}'", o.model));
  }
  if (model.differential) {
    throw InvalidArgument("calibrate", "--model", "a model whose cache can hold int8 codes",
                          fmt::format("'{}'", o.model));
  }
  std::unique_ptr<Executor> own_pool;
  if (o.threads) own_pool = make_thread_pool(*o.threads);
  config.executor = own_pool ? own_pool.get() : &default_executor();
  const serving::Trace trace = load_trace(o.input, o.seed);

  ValueScaleCalibration calibration(num_caches, model.num_kv_heads, model.head_dim);
  std::int64_t tokens = 0;
  config.on_values = [&](int layer, const ConstTensorView& value) {
    calibration.observe(layer, value);
    if (layer == 0) tokens += value.shape[0];
  };
  Progress progress;
  config.on_progress = [&](const serving::ReplayProgress& p) {
    progress.update(p.fraction, fmt::format("{} of {} requests, {} steps, {} tokens, {:.0f} s",
                                            p.finished_requests, p.requests, p.steps,
                                            p.computed_tokens, p.seconds));
  };
  const serving::ReplayResult result = serving::replay(trace, config);
  progress.clear();
  const ValueScales scales = calibration.scales();
  scales.save(o.output);
  fmt::print(to, "values of {} tokens in {} steps, model {}\n", tokens, result.steps.size(),
             model.name);
  print(scales, o.output, to);
  ordered_json j = to_json(scales, o.output);
  j["model"] = model.name;
  j["tokens"] = tokens;
  j["steps"] = result.steps.size();
  return j;
}

void run(const CalibrateOptions& o) {
  if (o.show.empty() == (o.input.name.empty() && o.output.empty())) {
    throw InvalidArgument("calibrate", "options", "TRACE and --output FILE, or --show FILE",
                          o.show.empty() ? "none of them" : "both");
  }
  // Standard output is the JSON's alone if the user asked for it there.
  std::FILE* to = o.json_path == "-" ? stderr : stdout;
  if (!o.show.empty()) {
    const ValueScales scales = ValueScales::load(o.show);
    print(scales, o.show, to);
    write_json(to_json(scales, o.show), o.json_path);
    return;
  }
  if (o.input.name.empty() || o.output.empty()) {
    throw InvalidArgument("calibrate", o.input.name.empty() ? "TRACE" : "--output",
                          "TRACE and --output FILE together", "only one of them");
  }
  write_json(calibrate(o, to), o.json_path);
}

}  // namespace

void add_calibrate(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "calibrate", "Find the static scales of int8 values over a trace, and store them");
  const auto options = std::make_shared<CalibrateOptions>();
  CalibrateOptions& o = *options;
  add_trace_options(*command, o.input);
  const auto option = [&](const char* name, auto& value, const char* help, const char* type) {
    return command->add_option(name, value, help)->type_name(type);
  };
  option("--output", o.output, "File to write", "FILE");
  option("--show", o.show, "Print what a file holds, instead of making one", "FILE");
  option("--model", o.model, "Model preset, see below", "NAME")->capture_default_str();
  option("--layers", o.num_layers, "Layers to run; default: all of the model", "N");
  option("--threads", o.threads, "Threads; default: the CPUs this process may use", "N");
  option("--seed", o.seed, "Seed of values and the synthetic trace", "S")->capture_default_str();
  add_json_option(*command, o.json_path);
  command->footer(std::string(kCalibrateHelp) + std::string(kTraceHelp) + std::string(kExamples) +
                  model_list());
  command->callback([options] { run(*options); });
}

}  // namespace attend::cli
