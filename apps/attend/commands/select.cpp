// SPDX-License-Identifier: Apache-2.0
// attend select: which back end serves a configuration, and why the others do not.
#include <fmt/format.h>

#include <memory>
#include <optional>
#include <string>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "cli.h"
#include "mla_prefill_report.h"
#include "selection_report.h"

namespace attend::cli {
namespace {

constexpr int kDefaultHeadSize = 128;

struct SelectOptions {
  AttentionConfig config;
  std::optional<int> head_size;
  std::string platform = "cpu";
  std::string dtype = "bf16";
  std::string attn_type = "decoder";
  std::string backend = "auto";
  MlaPrefillOptions prefill;
  std::string json_path;
};

AttentionConfig parse(const SelectOptions& options) {
  AttentionConfig config = options.config;
  config.platform = Platform::parse(options.platform);
  const auto dtype = parse_dtype(options.dtype);
  if (!dtype) {
    throw InvalidArgument("select", "--dtype", "a dtype such as f32, f16 or bf16",
                          fmt::format("'{}'", options.dtype));
  }
  config.dtype = *dtype;
  const auto type = parse_attention_type(options.attn_type);
  if (!type) {
    throw InvalidArgument("select", "--attn-type",
                          "decoder, encoder, encoder_only or encoder_decoder",
                          fmt::format("'{}'", options.attn_type));
  }
  config.attn_type = *type;
  // What an MLA back end calls its head size is a row of its cache.
  config.head_size = options.head_size.value_or(
      config.use_mla ? options.prefill.config.dims.cache_dim() : kDefaultHeadSize);
  return config;
}

/// Sparse attention has no prefill of its own.
bool has_prefill(const AttentionConfig& config) { return config.use_mla && !config.use_sparse; }

MlaPrefillOptions prefill_options(const SelectOptions& options, const AttentionConfig& config) {
  MlaPrefillOptions prefill = options.prefill;
  prefill.config.platform = config.platform;
  prefill.config.dtype = config.dtype;
  prefill.config.batch_invariant = config.batch_invariant;
  return prefill;
}

nlohmann::ordered_json as_json(const AttentionConfig& c) {
  nlohmann::ordered_json j;
  j["platform"] = to_string(c.platform);
  j["head_size"] = c.head_size;
  j["dtype"] = to_string(c.dtype);
  j["kv_cache_dtype"] = c.kv_cache_dtype;
  j["block_size"] = c.block_size ? nlohmann::ordered_json(*c.block_size) : nullptr;
  j["attn_type"] = to_string(c.attn_type);
  j["use_mla"] = c.use_mla;
  j["use_sparse"] = c.use_sparse;
  j["use_differential"] = c.use_differential;
  j["has_sink"] = c.has_sink;
  j["use_alibi_sqrt"] = c.use_alibi_sqrt;
  j["use_non_causal"] = c.use_non_causal;
  j["batch_invariant"] = c.batch_invariant;
  j["use_per_head_quant_scales"] = c.use_per_head_quant_scales;
  j["use_mm_prefix"] = c.use_mm_prefix;
  j["use_kv_connector"] = c.use_kv_connector;
  return j;
}

nlohmann::ordered_json as_json(const Selection& selection, const AttentionConfig& config) {
  nlohmann::ordered_json j;
  j["config"] = as_json(config);
  add_selection(j, selection);
  return j;
}

void run(const SelectOptions& options) {
  const AttentionConfig config = parse(options);
  const bool prints = options.json_path != "-";
  const Selection selection =
      options.backend == "auto" ? select_backend(config) : select_backend(config, options.backend);
  nlohmann::ordered_json result = as_json(selection, config);
  bool fits = selection.backend != nullptr;
  MlaPrefillSelection prefill_selection;
  const MlaPrefillOptions prefill = prefill_options(options, config);
  if (has_prefill(config)) {
    prefill_selection = select_mla_prefill(prefill);
    result["mla_prefill"] = mla_prefill_json(prefill_selection, prefill.config);
    fits = fits && prefill_selection.backend != nullptr;
  }
  if (prints) {
    print_selection(selection, describe(config), [](const std::string&) { return std::string(); });
    if (has_prefill(config)) print_mla_prefill(prefill_selection, prefill.config);
  }
  write_json(result, options.json_path);
  if (!fits) throw Exit{kCheckFailed};
}

void add_options(CLI::App& command, SelectOptions& o) {
  AttentionConfig& c = o.config;
  command.add_option("--platform", o.platform, "cpu, cuda:MAJOR.MINOR or rocm:ARCH")
      ->type_name("P")
      ->capture_default_str();
  command
      .add_option("--head-size", o.head_size,
                  fmt::format("Elements of one head; unset = {}, with --mla those of a cache row",
                              kDefaultHeadSize))
      ->type_name("N");
  command.add_option("--dtype", o.dtype, "Type of queries, keys and values: f32, f16 or bf16")
      ->type_name("D")
      ->capture_default_str();
  command
      .add_option("--kv-cache-dtype", c.kv_cache_dtype,
                  "Type of the cache: auto (= --dtype), f16, bf16, f32, fp8_e4m3, fp8_e5m2, "
                  "int8_level1, int8_level2, int8_per_token_head or, with --mla, fp8_ds_mla")
      ->type_name("D")
      ->capture_default_str();
  command.add_option("--block-size", c.block_size, "Tokens in a cache block; unset = any")
      ->type_name("N");
  command
      .add_option("--attn-type", o.attn_type, "decoder, encoder, encoder_only or encoder_decoder")
      ->type_name("T")
      ->capture_default_str();
  command.add_option("--backend", o.backend, "Ask for this one only, e.g. FLASH_ATTN")
      ->type_name("NAME")
      ->capture_default_str();
  CLI::Option* mla = command.add_flag("--mla", c.use_mla, "Multi-head latent attention");
  command.add_flag("--sparse", c.use_sparse, "Attend to indexed keys only");
  command.add_flag("--differential", c.use_differential,
                   "The difference of two softmax maps, weighted with lambda");
  command.add_flag("--sink", c.has_sink, "The model has attention sinks");
  command.add_flag("--alibi-sqrt", c.use_alibi_sqrt, "ALiBi by the square root of the distance");
  command.add_flag("--non-causal", c.use_non_causal, "Queries see keys after them");
  command.add_flag("--batch-invariant", c.batch_invariant,
                   "A row's bits must not depend on its batch");
  command.add_flag("--per-head-quant-scales", c.use_per_head_quant_scales,
                   "The quantised cache has one scale a head");
  command.add_flag("--mm-prefix", c.use_mm_prefix, "Image tokens of a prompt see each other");
  command.add_flag("--kv-connector", c.use_kv_connector, "Cache blocks move between engines");
  add_mla_prefill_options(command, *mla, o.prefill);
  add_json_option(command, o.json_path);
}

}  // namespace

void add_select(CLI::App& app) {
  auto options = std::make_shared<SelectOptions>();
  CLI::App* command =
      app.add_subcommand("select", "Say which back end serves a configuration, and why");
  command->footer(
      "Every back end is asked; the first of the platform's priority list without a reason "
      "against\n"
      "it is the choice. The platform need not be this machine. Exit code 0: something fits, 1:\n"
      "nothing does, 2: wrong usage. With --mla there are two choices: the back end and what it\n"
      "runs prefill with. docs/selection.md explains the reasons.\n\n"
      "Examples:\n"
      "  attend select --head-size 128 --dtype bf16\n"
      "  attend select --platform cuda:9.0 --mla --json -\n"
      "  attend select --differential --head-size 64 --kv-cache-dtype fp8_e4m3\n"
      "  attend select --platform rocm:gfx942 --backend FLASH_ATTN");
  add_options(*command, *options);
  command->callback([options] { run(*options); });
}

}  // namespace attend::cli
