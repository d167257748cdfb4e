// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/quantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attend/core/float_types.h"

namespace attend {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

TEST(QuantizeOracleTest, CodesHaveThePublishedValues) {
  EXPECT_EQ(oracle::fp8_value(DType::fp8_e4m3, 0x7E), 448.0);
  EXPECT_EQ(oracle::fp8_value(DType::fp8_e4m3, 0x01), 0x1p-9);
  EXPECT_EQ(oracle::fp8_value(DType::fp8_e4m3, 0xB8), -1.0);
  EXPECT_TRUE(std::isnan(oracle::fp8_value(DType::fp8_e4m3, 0x7F)));
  EXPECT_TRUE(std::isnan(oracle::fp8_value(DType::fp8_e4m3, 0xFF)));
  EXPECT_EQ(oracle::fp8_value(DType::fp8_e5m2, 0x7B), 57344.0);
  EXPECT_EQ(oracle::fp8_value(DType::fp8_e5m2, 0x01), 0x1p-16);
  EXPECT_EQ(oracle::fp8_value(DType::fp8_e5m2, 0x7C), kInf);
  EXPECT_EQ(oracle::fp8_value(DType::fp8_e5m2, 0xFC), -kInf);
  for (const int code : {0x7D, 0x7E, 0x7F, 0xFD}) {
    EXPECT_TRUE(std::isnan(oracle::fp8_value(DType::fp8_e5m2, static_cast<std::uint8_t>(code))));
  }
}

// Two decoders that share nothing, over every code.
TEST(QuantizeOracleTest, TheLibraryDecodesEveryCodeAlike) {
  for (int i = 0; i < 256; ++i) {
    const auto code = static_cast<std::uint8_t>(i);
    const double e4m3 = oracle::fp8_value(DType::fp8_e4m3, code);
    const double e5m2 = oracle::fp8_value(DType::fp8_e5m2, code);
    const float got4 = to_f32(fp8_e4m3{code}), got5 = to_f32(fp8_e5m2{code});
    EXPECT_TRUE(std::isnan(e4m3) ? std::isnan(got4) : got4 == e4m3) << i;
    EXPECT_TRUE(std::isnan(e5m2) ? std::isnan(got5) : got5 == e5m2) << i;
    EXPECT_EQ(std::signbit(got4), i >= 0x80) << i;
    EXPECT_EQ(std::signbit(got5), i >= 0x80) << i;
  }
}

TEST(QuantizeOracleTest, Fp8TiesGoToTheEvenCodeAndLargeValuesSaturate) {
  EXPECT_EQ(oracle::fp8_code(DType::fp8_e4m3, 1.0625, 1.0F), 0x38);  // between 1 and 1.125
  EXPECT_EQ(oracle::fp8_code(DType::fp8_e4m3, 1.1875, 1.0F), 0x3A);  // between 1.125 and 1.25
  EXPECT_EQ(oracle::fp8_code(DType::fp8_e4m3, -4.0, 2.0F), 0xC0);
  EXPECT_EQ(oracle::fp8_code(DType::fp8_e4m3, 1e9, 1.0F), 0x7E);
  EXPECT_EQ(oracle::fp8_code(DType::fp8_e5m2, -kInf, 1.0F), 0xFB);
  EXPECT_EQ(oracle::fp8_code(DType::fp8_e5m2, kNan, 1.0F), 0x7F);
}

TEST(QuantizeOracleTest, Int8) {
  EXPECT_EQ(oracle::int8_scale(std::vector<double>{1.0, -254.0, 3.0}), 2.0F);
  EXPECT_EQ(oracle::int8_scale(std::vector<double>{0.0, 1e-9}), 1e-6F);
  EXPECT_EQ(oracle::int8_scale({}), 1e-6F);
  EXPECT_TRUE(std::isnan(oracle::int8_scale(std::vector<double>{1.0, kInf})));
  EXPECT_TRUE(std::isnan(oracle::int8_scale(std::vector<double>{kNan, 1.0})));
  const std::vector<std::pair<double, int>> cases = {
      {0.5, 0},     {1.5, 2},     {2.5, 2},   {-0.5, 0},    {-1.5, -2},  {-2.5, -2},   {2.51, 3},
      {126.4, 126}, {127.6, 127}, {1e9, 127}, {-128, -127}, {kInf, 127}, {-kInf, -127}};
  for (const auto& [x, code] : cases) EXPECT_EQ(oracle::int8_code(x, 1.0F), code) << x;
  EXPECT_EQ(oracle::int8_code(5.0, std::numeric_limits<float>::quiet_NaN()), 0);
}

TEST(QuantizeOracleTest, RowsOfFp8DsMla) {
  std::vector<double> latent(512, 0.0);
  latent[0] = -448.0, latent[1] = 1.0, latent[128] = 1.0, latent[129] = kInf, latent[256] = -kNan;
  latent[384] = 896.0, latent[385] = -3.0;
  std::vector<std::uint16_t> rope(64, 0x3F80);
  rope[63] = 0xC000;
  std::vector<std::uint8_t> row(656, 0xAA);
  oracle::fp8_ds_mla_encode(latent, rope, row);
  const auto scale = [&](std::size_t tile) {
    return std::vector<int>(row.begin() + 512 + 4 * static_cast<std::ptrdiff_t>(tile),
                            row.begin() + 516 + 4 * static_cast<std::ptrdiff_t>(tile));
  };
  EXPECT_EQ(scale(0), (std::vector<int>{0, 0, 0x80, 0x3F}));
  EXPECT_EQ(scale(1), (std::vector<int>{0x25, 0x49, 0x12, 0x3B}));  // 1 / 448
  EXPECT_EQ(scale(2), (std::vector<int>{0, 0, 0x80, 0}));           // 2^-126
  EXPECT_EQ(scale(3), (std::vector<int>{0, 0, 0, 0x40}));
  for (const auto& [at, code] : std::vector<std::pair<std::size_t, int>>{{0, 0xFE},
                                                                         {1, 0x38},
                                                                         {2, 0},
                                                                         {128, 0x7E},
                                                                         {129, 0x7F},
                                                                         {256, 0xFF},
                                                                         {257, 0},
                                                                         {384, 0x7E},
                                                                         {385, 0xBC},
                                                                         {528, 0x80},
                                                                         {529, 0x3F},
                                                                         {654, 0},
                                                                         {655, 0xC0}})
    EXPECT_EQ(row[at], code) << at;

  std::vector<double> elements(576);
  oracle::fp8_ds_mla_decode(row, elements);
  EXPECT_EQ(elements[0], -448.0);
  EXPECT_EQ(elements[128], 1.0) << "448 * float(1 / 448) rounds to it";
  EXPECT_TRUE(std::isnan(elements[129]));
  EXPECT_TRUE(std::isnan(elements[256]) && !std::signbit(elements[256]));
  EXPECT_EQ(elements[385], -3.0);
  EXPECT_EQ(elements[512], 1.0);
  EXPECT_EQ(elements[575], -2.0);
}

TEST(QuantizeOracleTest, KeysOfTheIndexer) {
  std::vector<double> key(128, 0.0);
  std::vector<std::uint8_t> codes(128);
  EXPECT_EQ(oracle::indexer_key(key, false, codes), 1e-4F / 448.0F);
  EXPECT_EQ(oracle::indexer_key(key, true, codes), 0x1p-22F);
  EXPECT_EQ(codes, std::vector<std::uint8_t>(128));
  key[0] = -1.0, key[1] = 0.5, key[2] = kInf, key[3] = -kInf, key[4] = kNan;
  EXPECT_EQ(oracle::indexer_key(key, false, codes), 1.0F / 448.0F);
  EXPECT_EQ(std::vector<int>(codes.begin(), codes.begin() + 6),
            (std::vector<int>{0xFE, 0x76, 0x7F, 0xFF, 0x7F, 0x00}));
  EXPECT_EQ(oracle::indexer_key(key, true, codes), 0x1p-8F);
  EXPECT_EQ(std::vector<int>(codes.begin(), codes.begin() + 2), (std::vector<int>{0xF8, 0x70}));
  key[0] = 448.0;
  EXPECT_EQ(oracle::indexer_key(key, true, codes), 1.0F) << "a power of two already";
}

}  // namespace
}  // namespace attend
