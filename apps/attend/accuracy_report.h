// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <CLI/CLI.hpp>

namespace attend::cli {

/// Adds `accuracy` to the subcommand `report`.
void add_accuracy_report(CLI::App& report);

}  // namespace attend::cli
