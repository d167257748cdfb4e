// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "attend/core/error.h"

namespace attend::conformance {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(Check, EveryBackendHasCases) { EXPECT_THAT(uncovered_backends(), IsEmpty()); }

TEST(Check, PatternsChooseOps) {
  CheckOptions options;
  options.cases = 1;
  options.levels = {IsaLevel::scalar};
  options.ops = {"copy_?locks", "flash_attn_v*n"};
  std::vector<std::string> names;
  for (const CheckRow& row : run_checks(options).rows) names.push_back(row.op);
  EXPECT_THAT(names, ElementsAre("copy_blocks", "flash_attn_varlen"));
}

TEST(Check, AnUnknownOpIsRefusedWithTheValidNames) {
  CheckOptions options;
  options.ops = {"flash_atn"};
  try {
    run_checks(options);
    FAIL() << "accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "op");
    EXPECT_THAT(e.what(), HasSubstr("flash_attn_varlen"));
    EXPECT_THAT(e.what(), HasSubstr("flash_atn"));
  }
}

TEST(Check, AMissingLevelIsRefused) {
  if (available_isa_levels().back() == IsaLevel::amx) GTEST_SKIP() << "has every level";
  CheckOptions options;
  options.levels = {IsaLevel::amx};
  EXPECT_THROW(run_checks(options), Unsupported);
}

TEST(Check, OneCaseIsTheSameAloneAsInARun) {
  CheckOptions options;
  options.ops = {"flash_attn_varlen"};
  options.levels = {IsaLevel::scalar};
  options.only_case = 3;
  const double alone = run_checks(options).rows.at(0).worst_error;
  options.only_case = 4;
  EXPECT_NE(run_checks(options).rows.at(0).worst_error, alone);
  options.only_case = 3;
  EXPECT_EQ(run_checks(options).rows.at(0).worst_error, alone);
}

TEST(Check, ProgressCountsEveryCaseOnEveryLevel) {
  CheckOptions options;
  options.cases = 4;
  options.ops = {"flash_attn_varlen"};
  int calls = 0, last_total = 0;
  options.progress = [&](int done, int total, std::string_view) {
    EXPECT_EQ(done, ++calls);
    last_total = total;
  };
  run_checks(options);
  EXPECT_EQ(calls, last_total);
  EXPECT_EQ(calls, 4 * static_cast<int>(available_isa_levels().size()));
}

}  // namespace
}  // namespace attend::conformance
