// SPDX-License-Identifier: Apache-2.0
// attend report: measurements that end up in documents.
#include "accuracy_report.h"
#include "cli.h"

namespace attend::cli {

void add_report(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("report", "Tables about the library that anybody can make again");
  command->require_subcommand(1);
  command->footer(
      "\nEach report has --help and --json FILE.\n\nExamples:\n  attend report accuracy --json -");
  add_accuracy_report(*command);
}

}  // namespace attend::cli
