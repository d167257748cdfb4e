// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/run_cli.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;

TEST(ReportCommand, AccuracyAsJsonStandsAlone) {
  const CliResult r =
      run_cli("report accuracy --keys 64 --queries 4 --head-size 32 --seed 5 --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_EQ(j.at("keys"), 64);
  EXPECT_EQ(j.at("queries"), 4);
  EXPECT_EQ(j.at("head_size"), 32);
  EXPECT_EQ(j.at("seed"), 5);
  ASSERT_FALSE(j.at("schemes").empty());
  for (const auto& row : j.at("schemes")) {
    EXPECT_GT(row.at("relative_l1"), 0) << row;
    EXPECT_TRUE(row.at("data").is_string() && row.at("scheme").is_string()) << row;
  }
  ASSERT_FALSE(j.at("ops").empty());
  for (const auto& row : j.at("ops")) EXPECT_LE(row.at("over_arithmetic"), 1.2) << row;
}

TEST(ReportCommand, AccuracyTableNamesDataAndSchemes) {
  const CliResult r = run_cli("report accuracy --keys 64 --queries 4 --head-size 32");
  EXPECT_EQ(r.exit_code, 0) << r.err;
  for (const char* text :
       {"G0 iid", "G4 sink", "int8 K smooth", "int8 level 1", "flash_attn_varlen"}) {
    EXPECT_THAT(r.out, HasSubstr(text));
  }
}

TEST(ReportCommand, BadInputIsOneLineAndExitCodeTwo) {
  for (const char* arguments :
       {"report", "report nonsense", "report accuracy --keys 1", "report accuracy --queries 0",
        "report accuracy --head-size 12", "report accuracy --head-size 512"}) {
    const CliResult r = run_cli(arguments);
    EXPECT_EQ(r.exit_code, 2) << arguments;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << arguments << "\n" << r.err;
  }
}

TEST(ReportCommand, HelpTeaches) {
  const CliResult r = run_cli("report accuracy --help");
  EXPECT_EQ(r.exit_code, 0);
  EXPECT_THAT(r.out, HasSubstr("Examples:\n  attend report accuracy"));
}

}  // namespace
}  // namespace attend::testing
