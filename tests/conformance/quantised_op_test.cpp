// SPDX-License-Identifier: Apache-2.0
// Ops that read codes add next to nothing to the error that the codes have anyway.
#include "conformance/quantised_op.h"

#include <gtest/gtest.h>

#include <string>

#include "conformance/accuracy.h"
#include "support/scale.h"

namespace attend::conformance {
namespace {

class QuantisedOpAccuracy : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(QuantisedOpAccuracy, IsThatOfItsCodes) {
  const DataShape shape{.queries = testing::scaled(32, 8),
                        .keys = testing::scaled(1000, 300),  // the last piece is not full
                        .head_size = 128};
  for (const DataKind kind : kDataKinds) {
    const AttentionData data = make_attention_data(kind, shape, 1);
    const auto exact = exact_attention(data, false, default_executor());
    for (const QuantisedOp& op : quantised_ops()) {
      const QuantScheme& scheme = find_quant_scheme(op.scheme);
      const double arithmetic = relative_l1(
          exact, exact_attention(quantised(data, scheme), scheme.int8_weights, default_executor()));
      const double error = relative_l1(exact, op.run(data, scheme, GetParam(), default_executor()));
      EXPECT_LE(error, kMostOverArithmetic * arithmetic)
          << op.name << ", " << scheme.name << ", " << to_string(kind);
      EXPECT_GE(error, arithmetic / kMostOverArithmetic)  // the op did get the codes
          << op.name << ", " << scheme.name << ", " << to_string(kind);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, QuantisedOpAccuracy, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST(Accuracy, ReportHasEveryKindWithEverySchemeAndOp) {
  AccuracyOptions options;
  options.shape = {.queries = 2, .keys = 40, .head_size = 16};
  int calls = 0;
  options.progress = [&](int done, int total, std::string_view) {
    EXPECT_EQ(done, calls++);
    EXPECT_LT(done, total);
  };
  const AccuracyReport report = measure_accuracy(options);
  const std::size_t kinds = std::size(kDataKinds);
  EXPECT_EQ(report.schemes.size(), kinds * quant_schemes().size());
  EXPECT_EQ(report.ops.size(), kinds * quantised_ops().size());
  EXPECT_EQ(static_cast<std::size_t>(calls), report.schemes.size() + report.ops.size());
  for (const OpAccuracy& op : report.ops) {
    EXPECT_DOUBLE_EQ(op.error, op.over_arithmetic * report.error(op.data, op.scheme));
  }
}

}  // namespace
}  // namespace attend::conformance
