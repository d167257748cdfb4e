// SPDX-License-Identifier: Apache-2.0
// Which scheme of quantisation helps against which outliers. Only ratios: absolute errors depend on
// the size of the data.
#include "conformance/quant_scheme.h"

#include <gtest/gtest.h>

#include <cmath>

#include "attend/core/error.h"
#include "support/scale.h"

namespace attend::conformance {
namespace {

AttentionData sample(DataKind kind) {
  return make_attention_data(
      kind,
      {.queries = testing::scaled(64, 16), .keys = testing::scaled(1024, 512), .head_size = 128},
      1);
}

double error_of(std::string_view scheme, const AttentionData& data) {
  const QuantScheme& s = find_quant_scheme(scheme);
  return relative_l1(exact_attention(data, false, default_executor()),
                     exact_attention(quantised(data, s), s.int8_weights, default_executor()));
}

TEST(QuantScheme, ScalesPerChannelHelpAgainstLargeChannels) {
  const AttentionData data = sample(DataKind::channels);
  EXPECT_GE(error_of("int8 K per token", data), 2.5 * error_of("int8 K per channel", data));
}

TEST(QuantScheme, SmoothingHelpsAgainstLargeChannelsUnlessTheyAreRotated) {
  const AttentionData plain = sample(DataKind::channels);
  EXPECT_GE(error_of("int8 K per token", plain), 2.5 * error_of("int8 K smooth", plain));
  const AttentionData rotated = sample(DataKind::rotated_channels);
  EXPECT_LT(error_of("int8 K per token", rotated), 1.3 * error_of("int8 K smooth", rotated));
}

TEST(QuantScheme, OneScaleForAllSuffersFromASink) {
  const AttentionData data = sample(DataKind::sink);
  EXPECT_GE(error_of("int8 K per tensor", data), 5.0 * error_of("int8 K per token", data));
}

TEST(QuantScheme, WithoutQuantisationNothingIsLost) {
  const AttentionData data = sample(DataKind::outliers);
  QuantScheme smooth{.name = "smoothing alone"};
  smooth.smooth_k = true;
  const auto exact = exact_attention(data, false, default_executor());
  EXPECT_EQ(relative_l1(exact, exact_attention(quantised(data, {}), false, default_executor())),
            0.0);
  EXPECT_LT(relative_l1(exact, exact_attention(quantised(data, smooth), false, default_executor())),
            1e-11);
}

TEST(QuantScheme, CodesAndScalesAreSharedAsTheSchemeSays) {
  // [3, 2]: largest magnitudes are 8 per tensor; 1, 8, 4 per token; 4, 8 per channel.
  const std::vector<double> values{1.0, -0.5, 2.0, 8.0, -4.0, 3.0};
  const auto scales = [&](Sharing sharing) {
    return quantise(values, 2, {DType::i8, sharing}).scales;
  };
  const auto of = [](double amax) { return static_cast<float>(amax / 127.0); };
  EXPECT_EQ(scales(Sharing::tensor), (std::vector<float>{of(8)}));
  EXPECT_EQ(scales(Sharing::token), (std::vector<float>{of(1), of(8), of(4)}));
  EXPECT_EQ(scales(Sharing::channel), (std::vector<float>{of(4), of(8)}));
  EXPECT_EQ(scales(Sharing::channel_group), (std::vector<float>{of(4), of(8)}));
  std::vector<double> rows(2 * 65, 1.0);
  rows.back() = 127.0;  // in row 64, the first of the second group
  EXPECT_EQ(quantise(rows, 2, {DType::i8, Sharing::channel_group}).scales,
            (std::vector<float>{of(1), of(1), of(1), 1.0F}));

  const QuantisedTensor t = quantise(values, 2, {DType::i8, Sharing::token});
  EXPECT_EQ(static_cast<std::int8_t>(t.codes[1]), -64);  // -63.5 is between two codes
  EXPECT_EQ(t.values[3], 127.0 * static_cast<double>(of(8)));
  const QuantisedTensor fp8 = quantise(values, 2, {DType::fp8_e4m3, Sharing::tensor});
  EXPECT_EQ(fp8.codes[3], 0x7E);  // 448, the largest
  EXPECT_EQ(fp8.values[3], 448.0 * static_cast<double>(static_cast<float>(8.0 / 448.0)));
}

TEST(QuantScheme, Int8WeightsAreRoundedWithinAPiece) {
  // One query, two keys: weights 1 and exp(-6) * 127 = 0.31, which has the code 0.
  AttentionData data;
  data.shape = {.queries = 1, .keys = 2, .head_size = 1};
  data.q = {1.0};
  data.k = {6.0, 0.0};
  data.v = {1.0, 100.0};
  EXPECT_EQ(exact_attention(data, true, default_executor()), (std::vector<double>{1.0}));
  EXPECT_NEAR(exact_attention(data, false, default_executor())[0],
              (1.0 + 100.0 * std::exp(-6.0)) / (1.0 + std::exp(-6.0)), 1e-14);
  // In a piece of its own the second key is the largest and keeps its weight.
  data.shape.keys = 257;
  data.k.assign(257, 6.0);
  data.v.assign(257, 1.0);
  data.k.back() = 0.0;
  data.v.back() = 100.0;
  const double w = std::exp(-6.0) / 256.0;
  EXPECT_NEAR(exact_attention(data, true, default_executor())[0], (1.0 + 100.0 * w) / (1.0 + w),
              1e-12);
}

TEST(QuantScheme, AnUnknownNameIsRefused) {
  EXPECT_THROW(find_quant_scheme("int3"), InvalidArgument);
}

}  // namespace
}  // namespace attend::conformance
