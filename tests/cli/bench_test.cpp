// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>
#include <vector>

#include "cli/run_cli.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using ::testing::StartsWith;

/// First word of each line.
std::vector<std::string> listed(const std::string& pattern) {
  const CliResult r = run_cli("bench --list --case '" + pattern + "'");
  EXPECT_EQ(r.exit_code, 0) << r.err;
  std::vector<std::string> names;
  std::istringstream lines(r.out);
  for (std::string line; std::getline(lines, line);)
    names.push_back(line.substr(0, line.find(' ')));
  return names;
}

TEST(BenchCommand, ListsTheCasesOnce) {
  std::vector<std::string> names = listed("*");
  EXPECT_THAT(names, IsSupersetOf({"prefill_bf16_gqa4_d128_4k", "decode_bf16_gqa4_8x32k",
                                   "decode_f16_gqa4_8x32k", "decode_int8l1_gqa4_8x32k",
                                   "decode_int8l2_gqa4_8x32k", "decode_fp8_e4m3_gqa4_8x32k",
                                   "decode_fp8_e5m2_gqa4_8x32k", "decode_bf16_64x512",
                                   "short_batch_64x128", "batch_mix", "single_token_128_1t"}));
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
}

TEST(BenchCommand, ExactArithmeticHasCasesOfItsOwn) {
  const std::vector<std::string> names = listed("*");
  int with_exact = 0;
  for (const std::string& name : names) {
    if (name.ends_with("_exact")) continue;
    const bool choice = name.starts_with("prefill_bf16") || name.starts_with("prefill_f16") ||
                        name.starts_with("short_batch_") || name.starts_with("mla_prefill_") ||
                        name.starts_with("mla_decode_");
    EXPECT_EQ(std::count(names.begin(), names.end(), name + "_exact"), choice ? 1 : 0) << name;
    with_exact += choice ? 1 : 0;
  }
  EXPECT_GT(with_exact, 5);
}

TEST(BenchCommand, PatternsChooseCases) {
  const std::vector<std::string> names = listed("short_batch_*");
  ASSERT_FALSE(names.empty());
  for (const std::string& name : names) EXPECT_THAT(name, StartsWith("short_batch_"));
  const CliResult none = run_cli("bench --case no_such_case");
  EXPECT_EQ(none.exit_code, 2);
  EXPECT_THAT(none.err, HasSubstr("no_such_case"));
}

TEST(BenchCommand, JsonHasTheStableKeys) {
  const CliResult r =
      run_cli("bench --case single_token_128_1t --seconds 0.01 --attempts 2 --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out);
  EXPECT_GT(j.at("ceilings").at("read_gbps"), 0.0);
  EXPECT_GT(j.at("ceilings").at("run_read_gbps"), 0.0);
  ASSERT_EQ(j.at("cases").size(), 1U);
  const auto& c = j.at("cases").at(0);
  EXPECT_EQ(c.at("case"), "single_token_128_1t");
  EXPECT_EQ(c.at("threads"), 1);
  EXPECT_EQ(c.at("bound"), "memory");
  EXPECT_EQ(c.at("verified"), true);
  EXPECT_GE(c.at("runs"), 7);
  for (const char* key : {"seconds", "seconds_min", "gflops", "gbps", "share", "ceiling"})
    EXPECT_GT(c.at(key), 0.0) << key;
  EXPECT_EQ(c.at("noisy"), c.at("lost_fraction") > 0.02);
  EXPECT_EQ(j.at("noisy"), c.at("noisy") || j.at("ceilings").at("noisy"));
  for (const auto& attempts : {c.at("attempts"), j.at("ceilings").at("attempts")}) {
    EXPECT_GE(attempts, 1);
    EXPECT_LE(attempts, 2);
  }
  EXPECT_FALSE(c.contains("parts"));
}

TEST(BenchCommand, DifferentialAttentionIsComparedWithFourCallsAndPlainAttention) {
  EXPECT_THAT(listed("diff_*"), IsSupersetOf({"diff_decode_d64_16k", "diff_decode_fp8_d64_16k",
                                              "diff_decode_d128_16k", "diff_prefill_d64_4k"}));
  const CliResult r =
      run_cli("bench --case diff_single_token_128 --seconds 0.01 --attempts 1 --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto c = nlohmann::json::parse(r.out).at("cases").at(0);
  EXPECT_EQ(c.at("verified"), true);
  const auto& parts = c.at("parts");
  ASSERT_EQ(parts.size(), 3U);
  const auto seconds = [&](std::size_t i, const char* name) {
    EXPECT_EQ(parts.at(i).at("part"), name);
    return parts.at(i).at("seconds").get<double>() / c.at("seconds").get<double>();
  };
  EXPECT_DOUBLE_EQ(c.at("speedup_over_four_calls"), seconds(0, "four calls"));
  EXPECT_DOUBLE_EQ(c.at("time_over_plain"), 1.0 / seconds(1, "plain"));
  EXPECT_DOUBLE_EQ(c.at("time_over_plain_exact"), 1.0 / seconds(2, "plain, exact"));
  EXPECT_FALSE(c.contains("parts_over_whole"));
}

/// The one explanation of `attend bench --explain` of a case, shortly measured.
nlohmann::json explained(const std::string& name) {
  const CliResult r = run_cli("bench --explain " + name + " --seconds 0.01 --attempts 1 --json -");
  EXPECT_EQ(r.exit_code, 0) << r.err;
  const auto list = nlohmann::json::parse(r.out).at("explanations");
  EXPECT_EQ(list.size(), 1U);
  return list.at(0);
}

TEST(BenchCommand, ExplainsWhereTheTimeGoes) {
  const auto e = explained("single_token_128_1t");
  EXPECT_EQ(e.at("case"), "single_token_128_1t");
  EXPECT_EQ(e.at("threads"), 1);
  EXPECT_GT(e.at("seconds"), 0.0);
  EXPECT_GT(e.at("seconds_plain"), 0.0);
  double sum = 0.0;
  std::vector<std::string> used;
  for (const auto& phase : e.at("phases")) {
    EXPECT_GE(phase.at("share"), 0.0) << phase;
    sum += phase.at("share").get<double>();
    if (phase.at("share") > 0.0) used.push_back(phase.at("phase"));
  }
  EXPECT_NEAR(sum, 1.0, 1e-9);
  EXPECT_THAT(used, IsSupersetOf({"queries and outputs", "pack", "QK", "softmax", "PV",
                                  "waiting (start, imbalance)", "set-up of the call"}));
  EXPECT_GT(e.at("model").at("pack_seconds"), 0.0);
  EXPECT_GT(e.at("model").at("products_seconds"), 0.0);
}

TEST(BenchCommand, NothingIsExplainedOfAnUnknownCase) {
  const CliResult r = run_cli("bench --explain no_such_case");
  EXPECT_EQ(r.exit_code, 2);
  EXPECT_THAT(r.err, HasSubstr("--explain"));
}

}  // namespace
}  // namespace attend::testing
