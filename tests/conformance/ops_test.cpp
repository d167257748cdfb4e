// SPDX-License-Identifier: Apache-2.0
// What `attend check` runs, with fewer cases, as tests.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>

#include "conformance/check.h"
#include "support/scale.h"

namespace attend::conformance {
namespace {

class Conformance : public ::testing::TestWithParam<std::string> {};

TEST_P(Conformance, AgreesWithTheOracleOnEveryLevel) {
  CheckOptions options;
  options.cases = testing::scaled(60, 12);
  options.seed = 20240601;
  options.ops = {GetParam()};
  const CheckReport report = run_checks(options);
  ASSERT_FALSE(report.rows.empty());
  for (const CheckRow& row : report.rows) EXPECT_EQ(row.cases, options.cases) << to_string(row.isa);
  for (const CheckFailure& f : report.failures) {
    ADD_FAILURE() << f.problem << "\n" << f.message << "\nrepeat: " << f.command;
  }
}

std::vector<std::string> op_names() {
  std::vector<std::string> names;
  for (const Op& op : ops()) names.push_back(op.name);
  return names;
}

std::string test_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}
INSTANTIATE_TEST_SUITE_P(Ops, Conformance, ::testing::ValuesIn(op_names()), test_name);

}  // namespace
}  // namespace attend::conformance
