// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

namespace attend::testing {

struct CliResult {
  int exit_code = -1;
  std::string out;
  std::string err;
};

/// Runs the command-line program of this build with `arguments` (shell words).
CliResult run_cli(const std::string& arguments);

}  // namespace attend::testing
