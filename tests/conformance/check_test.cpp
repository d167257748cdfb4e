// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "attend/core/error.h"
#include "support/scale.h"

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

TEST(Check, ExactArithmeticRunsWhatHasAChoice) {
  CheckOptions options;
  options.cases = testing::scaled(20, 6);
  options.levels = {available_isa_levels().back()};
  options.arithmetic = Arithmetic::exact;
  const CheckReport report = run_checks(options);
  std::vector<std::string> names;
  for (const CheckRow& row : report.rows) {
    names.push_back(row.op);
    EXPECT_GT(row.cases, 0) << row.op;
    // int8 queries and keys have no choice.
    const bool some = row.op == "shared_prefixes" || row.op == "backend:FLASH_ATTN:int8";
    EXPECT_EQ(row.cases < options.cases, some) << row.op << " " << row.cases;
  }
  EXPECT_THAT(
      names, ElementsAre("backend:FLASHMLA_SPARSE", "backend:FLASH_ATTN", "backend:FLASH_ATTN:int8",
                         "backend:FLASH_ATTN_MLA", "flash_attn_varlen", "flash_attn_with_kvcache",
                         "mla_decode", "shared_prefixes", "sparse_flash_mla_fwd",
                         "sparse_flash_mla_with_kvcache", "sparse_layer", "sparse_mla_attention"));
  for (const CheckFailure& f : report.failures) {
    ADD_FAILURE() << f.problem << "\n" << f.message << "\nrepeat: " << f.command;
  }
  options.ops = {"copy_blocks"};
  EXPECT_THROW(run_checks(options), InvalidArgument);
}

TEST(Check, FastArithmeticRunsOnLevelsThatHaveIt) {
  CheckOptions options;
  options.cases = testing::scaled(30, 6);
  options.arithmetic = Arithmetic::fast;
  options.ops = {"flash_attn_varlen"};
  if (available_isa_levels().back() < IsaLevel::amx) {
    EXPECT_THROW(run_checks(options), Unsupported);
    return;
  }
  const CheckReport report = run_checks(options);
  ASSERT_EQ(report.rows.size(), 1U);
  EXPECT_EQ(report.rows[0].isa, IsaLevel::amx);
  EXPECT_GT(report.rows[0].cases, 0);
  EXPECT_LT(report.rows[0].cases, options.cases) << "float32 and float16 have no fast kernels";
  EXPECT_THAT(report.failures, IsEmpty());
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
