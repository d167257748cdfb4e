// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/projection.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

namespace attend::oracle {
namespace {

/// One head with P = 8, V = 16 and L = 8, weight[r][c] = r + 100 c.
struct Counted {
  Counted() {
    for (int r = 0; r < 24; ++r)
      for (int c = 0; c < 8; ++c) weight[static_cast<std::size_t>(r * 8 + c)] = r + 100.0F * c;
    args.weight = {weight.data(), DType::f32, {24, 8}};
    args.dims = {8, 8, 8, 16};
    args.num_heads = 1;
    args.dtype = DType::f32;
  }
  std::array<float, 24 * 8> weight{};
  KvBProjArgs args;
};

TEST(OracleProjection, KeysComeBeforeValues) {
  const Counted c;
  const KvBProj w = kv_b_proj(c.args);
  EXPECT_EQ(w.key(0, 3, 2), 203.0);
  EXPECT_EQ(w.value(0, 3, 2), 211.0);
}

TEST(OracleProjection, ProductsPickTheRightElements) {
  const Counted c;
  const KvBProj w = kv_b_proj(c.args);
  // Unit vectors: element 2 of the latent, or of the query.
  const std::array<float, 8> unit = {0, 0, 1, 0, 0, 0, 0, 0};
  const ConstTensorView row(unit.data(), DType::f32, {1, 8});
  const ConstTensorView heads(unit.data(), DType::f32, {1, 1, 8});
  EXPECT_EQ(up_project_keys(w, row).out,
            (std::vector<double>{200, 201, 202, 203, 204, 205, 206, 207}));
  EXPECT_EQ(up_project_values(w, row).out[15], 223.0);
  EXPECT_EQ(v_up_project(w, heads).out, up_project_values(w, row).out);
  EXPECT_EQ(absorb_query(w, heads).out,
            (std::vector<double>{2, 102, 202, 302, 402, 502, 602, 702}));
}

TEST(OracleProjection, ScalesAreThoseOfRowsOrBlocks) {
  constexpr int kColumns = 136;
  std::array<std::int8_t, 144 * kColumns> codes{};
  codes.fill(3);
  std::array<float, 144> scale{};
  for (std::size_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<float>(i + 1);
  KvBProjArgs a;
  a.weight = {codes.data(), DType::i8, {144, kColumns}};
  a.dims = {kColumns, 8, 8, 136};
  a.num_heads = 1;
  a.dtype = DType::f32;
  a.weight_scale = {scale.data(), DType::f32, {144}};
  EXPECT_EQ(kv_b_proj(a).key(0, 5, 130), 18.0);
  a.weight_scale = {scale.data(), DType::f32, {2, 2}};
  EXPECT_EQ(kv_b_proj(a).key(0, 5, 127), 3.0);
  EXPECT_EQ(kv_b_proj(a).key(0, 5, 128), 6.0);
  EXPECT_EQ(kv_b_proj(a).value(0, 120, 127), 9.0);
  EXPECT_EQ(kv_b_proj(a).value(0, 120, 128), 12.0);
  a.weight_scale = {scale.data(), DType::f32, {1}};
  EXPECT_EQ(kv_b_proj(a).value(0, 120, 128), 3.0);
}

TEST(OracleProjection, RoundsTheProductOfCodeAndScaleTwice) {
  std::array<std::int8_t, 16 * 8> codes{};
  codes.fill(5);
  // 5 s is a little above the middle between two bf16 numbers, and that middle in float32.
  const float s = (0x1p24F + 0x1p16F) / 5.0F;
  KvBProjArgs a;
  a.weight = {codes.data(), DType::i8, {16, 8}};
  a.weight_scale = {&s, DType::f32, {1}};
  a.dims = {8, 8, 8, 8};
  a.num_heads = 1;
  a.dtype = DType::bf16;
  EXPECT_GT(5.0 * s, 0x1p24 + 0x1p16);
  EXPECT_EQ(5.0F * s, 0x1p24F + 0x1p16F);
  EXPECT_EQ(kv_b_proj(a).key(0, 0, 0), 0x1p24);
}

TEST(OracleProjection, BoundIsHalfAnUlpAndTheErrorOfTheSum) {
  const Counted c;
  KvBProj w = kv_b_proj(c.args);
  const std::array<float, 8> ones = {1, 1, 1, 1, 1, 1, 1, 1};
  const ConstTensorView row(ones.data(), DType::f32, {1, 8});
  const Projection f32 = up_project_keys(w, row);
  EXPECT_EQ(f32.out[0], 2800.0);
  EXPECT_NEAR(f32.bound[0], (2 * 9 + 1) * 0x1p-24 * 2800.0, 1e-3 * f32.bound[0]);
  w.dtype = DType::bf16;
  EXPECT_NEAR(up_project_keys(w, row).bound[0], 2800.0 * (0x1p-8 + 18 * 0x1p-24), 1e-3);
}

}  // namespace
}  // namespace attend::oracle
