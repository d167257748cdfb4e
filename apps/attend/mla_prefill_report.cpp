// SPDX-License-Identifier: Apache-2.0
#include "mla_prefill_report.h"

#include <fmt/format.h>

#include <array>
#include <tuple>
#include <utility>

#include "capability_text.h"
#include "selection_report.h"

namespace attend::cli {

void add_mla_prefill_options(CLI::App& command, CLI::Option& mla, MlaPrefillOptions& o) {
  constexpr const char* kGroup = "With --mla";
  o.config.dims = {512, 128, 64, 128};
  MlaDims& d = o.config.dims;
  for (const auto& [name, value, what] :
       {std::tuple{"--kv-lora-rank", &d.kv_lora_rank, "Elements of a token's latent"},
        {"--qk-nope-head-dim", &d.qk_nope_head_dim, "Elements of a head's query without position"},
        {"--qk-rope-head-dim", &d.qk_rope_head_dim, "Elements of a head's query with position"},
        {"--v-head-dim", &d.v_head_dim, "Elements of a head's value"}}) {
    command.add_option(name, *value, what)
        ->type_name("N")
        ->capture_default_str()
        ->needs(&mla)
        ->group(kGroup);
  }
  command.add_option("--mla-prefill", o.backend, "Ask for this prefill back end only, or auto")
      ->type_name("NAME")
      ->capture_default_str()
      ->needs(&mla)
      ->group(kGroup);
  command
      .add_flag("--quant-output", o.config.quant_output,
                "Prefill writes fp8_e4m3 outputs with a static scale")
      ->needs(&mla)
      ->group(kGroup);
}

MlaPrefillSelection select_mla_prefill(const MlaPrefillOptions& o) {
  return o.backend == "auto" ? attend::select_mla_prefill(o.config)
                             : attend::select_mla_prefill(o.config, o.backend);
}

void print_mla_prefill(const MlaPrefillSelection& selection, const MlaPrefillConfig& config) {
  fmt::print("\nMLA prefill\n");
  print_selection(selection, describe(config), [&](const std::string& name) {
    const bool pads = find_mla_prefill_backend(name).requires_v_padding(config.platform) &&
                      config.dims.v_head_dim < config.dims.qk_head_dim();
    return pads ? fmt::format("values are padded from {} to {} columns", config.dims.v_head_dim,
                              config.dims.qk_head_dim())
                : std::string();
  });
}

nlohmann::ordered_json mla_prefill_json(const MlaPrefillSelection& selection,
                                        const MlaPrefillConfig& c) {
  nlohmann::ordered_json j;
  j["config"] = {
      {"platform", to_string(c.platform)},           {"dtype", to_string(c.dtype)},
      {"kv_lora_rank", c.dims.kv_lora_rank},         {"qk_nope_head_dim", c.dims.qk_nope_head_dim},
      {"qk_rope_head_dim", c.dims.qk_rope_head_dim}, {"v_head_dim", c.dims.v_head_dim},
      {"batch_invariant", c.batch_invariant},        {"quant_output", c.quant_output}};
  add_selection(j, selection);
  j["requires_v_padding"] =
      selection.backend != nullptr
          ? nlohmann::ordered_json(selection.backend->requires_v_padding(c.platform))
          : nullptr;
  return j;
}

void print_mla_prefill(const MlaPrefillBackend& backend) {
  const MlaPrefillCapability& can = backend.capability();
  const std::string most =
      can.max_head_dim > 0 ? fmt::format(", heads at most {}", can.max_head_dim) : std::string();
  const std::string quant =
      can.quant_output_devices.empty() ? "nowhere" : list(names(can.quant_output_devices));
  const std::array<std::pair<const char*, std::string>, 7> rows = {{
      {"dtypes", dtype_list(can.dtypes, can.cpu_only_dtypes)},
      {"dimensions", multiples(can.dim_multiple, 0) + most},
      {"chosen on", list(names(can.devices))},
      {"cuda capability", capability_text(can.min_cuda_capability)},
      {"rocm archs", list(can.rocm_archs)},
      {"quantised output", quant},
      {"batch invariance", can.supports_batch_invariance ? "yes" : "no"},
  }};
  fmt::print("{} (MLA prefill)\n", backend.name());
  for (const auto& [label, text] : rows) fmt::print("  {:<17}{}\n", label, text);
}

nlohmann::ordered_json mla_prefill_json(const MlaPrefillBackend& backend) {
  const MlaPrefillCapability& can = backend.capability();
  nlohmann::ordered_json j;
  j["name"] = backend.name();
  j["dtypes"] = names(can.dtypes);
  j["cpu_only_dtypes"] = names(can.cpu_only_dtypes);
  j["dim_multiple"] = can.dim_multiple;
  j["max_head_dim"] = can.max_head_dim;
  j["devices"] = names(can.devices);
  j["min_cuda_capability"] = can.min_cuda_capability;
  j["rocm_archs"] = can.rocm_archs;
  j["quant_output_devices"] = names(can.quant_output_devices);
  j["features"]["batch_invariance"] = can.supports_batch_invariance;
  return j;
}

}  // namespace attend::cli
