// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

#include "attend/backend/mla_prefill.h"

namespace attend::cli {

/// The part of `attend select --mla` that is about the prefill back end.
struct MlaPrefillOptions {
  MlaPrefillConfig config;
  std::string backend = "auto";
};
/// `mla`: the option without which these have no meaning.
void add_mla_prefill_options(CLI::App& command, CLI::Option& mla, MlaPrefillOptions& options);

/// Answer for options whose configuration is complete. @throws InvalidArgument for an unknown name.
MlaPrefillSelection select_mla_prefill(const MlaPrefillOptions& options);
void print_mla_prefill(const MlaPrefillSelection& selection, const MlaPrefillConfig& config);
nlohmann::ordered_json mla_prefill_json(const MlaPrefillSelection& selection,
                                        const MlaPrefillConfig& config);

/// What one prefill back end can do.
void print_mla_prefill(const MlaPrefillBackend& backend);
nlohmann::ordered_json mla_prefill_json(const MlaPrefillBackend& backend);

}  // namespace attend::cli
