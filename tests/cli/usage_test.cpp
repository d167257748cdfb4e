// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include "cli/run_cli.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;

TEST(Usage, HelpTeachesWithExamples) {
  EXPECT_EQ(run_cli("--help").exit_code, 0);
  for (const std::string command :
       {"info", "backends", "select", "report", "calibrate", "bench", "tune"}) {
    const CliResult r = run_cli(command + " --help");
    EXPECT_EQ(r.exit_code, 0) << command;
    EXPECT_THAT(r.out, HasSubstr("Examples:\n  attend " + command)) << command;
    EXPECT_THAT(r.out, HasSubstr("--json")) << command;
  }
}

TEST(Usage, UnknownCommandIsExitCode2) {
  EXPECT_EQ(run_cli("conjure").exit_code, 2);
  EXPECT_EQ(run_cli("").exit_code, 2);
}

}  // namespace
}  // namespace attend::testing
