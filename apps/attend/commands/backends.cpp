// SPDX-License-Identifier: Apache-2.0
// attend backends: what each back end can do.
#include <fmt/format.h>

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attend/backend/selector.h"
#include "capability_text.h"
#include "cli.h"
#include "mla_prefill_report.h"

namespace attend::cli {
namespace {

using Flag = std::pair<const char*, bool>;

std::array<Flag, 10> flags(const Capability& can) {
  return {{{"mla", can.is_mla},
           {"sparse", can.is_sparse},
           {"differential", can.is_differential},
           {"sink", can.supports_sink},
           {"mm_prefix", can.supports_mm_prefix},
           {"per_head_quant_scales", can.supports_per_head_quant_scales},
           {"non_causal", can.supports_non_causal},
           {"alibi_sqrt", can.supports_alibi_sqrt},
           {"batch_invariance", can.supports_batch_invariance},
           {"kv_connector", can.supports_kv_connector}}};
}

std::string head_sizes(const Capability& can) {
  if (!can.head_sizes.empty()) return fmt::format("{}", fmt::join(can.head_sizes, ", "));
  return multiples(can.head_size_multiple, can.max_head_size);
}

nlohmann::ordered_json as_json(const Backend& backend) {
  const Capability& can = backend.capability();
  nlohmann::ordered_json j;
  j["name"] = backend.name();
  j["dtypes"] = names(can.dtypes);
  j["cpu_only_dtypes"] = names(can.cpu_only_dtypes);
  j["kv_cache_dtypes"] = can.kv_cache_dtypes;
  j["head_size_multiple"] = can.head_size_multiple;
  j["max_head_size"] = can.max_head_size;
  j["head_sizes"] = can.head_sizes;
  j["block_sizes"] = can.block_sizes;
  j["attn_types"] = names(can.attn_types);
  j["devices"] = names(can.devices);
  j["min_cuda_capability"] = can.min_cuda_capability;
  for (const auto& [name, set] : flags(can)) j["features"][name] = set;
  return j;
}

void print(const Backend& backend) {
  const Capability& can = backend.capability();
  std::vector<std::string> yes, no;
  for (const auto& [name, set] : flags(can)) (set ? yes : no).emplace_back(name);
  std::string blocks = "any";
  if (!can.block_sizes.empty()) {
    blocks = fmt::format("multiples of {}", fmt::join(can.block_sizes, ", "));
  }
  const std::array<std::pair<const char*, std::string>, 9> rows = {{
      {"dtypes", dtype_list(can.dtypes, can.cpu_only_dtypes)},
      {"kv cache dtypes", list(can.kv_cache_dtypes)},
      {"head sizes", head_sizes(can)},
      {"block sizes", blocks},
      {"attention types", list(names(can.attn_types))},
      {"chosen on", list(names(can.devices))},
      {"cuda capability", capability_text(can.min_cuda_capability)},
      {"has", yes.empty() ? "-" : list(yes)},
      {"has not", no.empty() ? "-" : list(no)},
  }};
  fmt::print("{}\n", backend.name());
  for (const auto& [label, text] : rows) fmt::print("  {:<17}{}\n", label, text);
}

}  // namespace

void add_backends(CLI::App& app) {
  auto json_path = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("backends", "List the back ends and what each can do");
  command->footer(
      "A back end serves a configuration only if every row fits. 'attend select' answers that for\n"
      "one configuration and says why the others are out.\n\n"
      "'chosen on' lists the platforms where a back end is chosen by itself; elsewhere it has to "
      "be\n"
      "asked for by name ('attend select --backend NAME'). Those marked 'MLA prefill' compute the\n"
      "prefill of MLA layers ('attend select --mla').\n\n"
      "Examples:\n"
      "  attend backends\n"
      "  attend backends --json - | jq '.backends[].name'");
  add_json_option(*command, *json_path);
  command->callback([json_path] {
    nlohmann::ordered_json result;
    result["backends"] = nlohmann::ordered_json::array();
    for (const Backend* backend : backends()) {
      result["backends"].push_back(as_json(*backend));
      if (*json_path != "-") print(*backend);
    }
    result["mla_prefill_backends"] = nlohmann::ordered_json::array();
    for (const MlaPrefillBackend* backend : mla_prefill_backends()) {
      result["mla_prefill_backends"].push_back(mla_prefill_json(*backend));
      if (*json_path != "-") print_mla_prefill(*backend);
    }
    write_json(result, *json_path);
  });
}

}  // namespace attend::cli
