// SPDX-License-Identifier: Apache-2.0
#include "plan/unit_cost.h"

#include <gtest/gtest.h>

#include <vector>

namespace attend {
namespace {

/// One token over 1024 keys, 8 query and 2 kv heads.
AttentionPlan decode_plan(int num_workers) {
  const std::vector<std::int32_t> query_start_loc{0, 1}, seq_lens{1024};
  AttentionPlanInput in;
  in.query_start_loc = query_start_loc;
  in.seq_lens = seq_lens;
  in.num_q_heads = 8;
  in.num_kv_heads = 2;
  in.head_dim_qk = in.head_dim_v = 64;
  in.num_workers = num_workers;
  in.isa = IsaLevel::scalar;
  return plan_attention(in);
}

TEST(UnitCost, AWholeUnitReadsAndMultipliesItsPieces) {
  const plan::UnitCost cost = plan::unit_cost(IsaLevel::scalar, DType::bf16, 64, 64);
  const plan::PlanEstimate e = plan::estimate(decode_plan(1), DType::bf16);
  constexpr int kPieces = 2 * 1024 / kPieceSize;  // of both kv heads
  EXPECT_DOUBLE_EQ(e.read_us, kPieces * cost.read_us);
  EXPECT_DOUBLE_EQ(e.products_us, kPieces * cost.products_us(4));
  EXPECT_EQ(e.merge_us, 0.0);
}

TEST(UnitCost, SplitUnitsMergeAsWell) {
  const plan::UnitCost cost = plan::unit_cost(IsaLevel::scalar, DType::bf16, 64, 64);
  const AttentionPlan plan = decode_plan(4);
  ASSERT_GT(plan.num_partial_rows, 0);
  const plan::PlanEstimate whole = plan::estimate(decode_plan(1), DType::bf16);
  const plan::PlanEstimate split = plan::estimate(plan, DType::bf16);
  EXPECT_DOUBLE_EQ(split.read_us, whole.read_us);
  EXPECT_DOUBLE_EQ(split.products_us, whole.products_us);
  EXPECT_DOUBLE_EQ(split.merge_us, static_cast<double>(plan.num_partial_rows) * cost.partial_us);
}

TEST(UnitCost, ExactArithmeticTakesTheTimeOfLevelsWithoutTiles) {
  AttentionPlan plan = decode_plan(1);
  const auto products_us = [&](IsaLevel isa, Arithmetic arithmetic) {
    plan.isa = isa;
    plan.arithmetic = arithmetic;
    return plan::estimate(plan, DType::bf16).products_us;
  };
  const double exact = products_us(IsaLevel::amx, Arithmetic::exact);
  EXPECT_EQ(exact, products_us(IsaLevel::avx512_spr, Arithmetic::automatic));
  EXPECT_LT(products_us(IsaLevel::amx, Arithmetic::automatic), exact);
}

TEST(UnitCost, TypesAndLevelsDiffer) {
  const auto cost = [](IsaLevel isa, DType keys) { return plan::unit_cost(isa, keys, 64, 64); };
  EXPECT_EQ(cost(IsaLevel::avx2, DType::f32).read_us,
            2.0 * cost(IsaLevel::avx2, DType::bf16).read_us);
  // Decoding makes up for the bytes that codes save.
  EXPECT_EQ(cost(IsaLevel::avx2, DType::fp8_e4m3).read_us,
            cost(IsaLevel::avx2, DType::bf16).read_us);
  EXPECT_LT(cost(IsaLevel::avx512, DType::bf16).row_us, cost(IsaLevel::avx2, DType::bf16).row_us);
  // Tiles take no float32.
  EXPECT_LT(cost(IsaLevel::amx, DType::bf16).row_us, cost(IsaLevel::avx512, DType::bf16).row_us);
  EXPECT_EQ(cost(IsaLevel::amx, DType::f32).row_us, cost(IsaLevel::avx512, DType::f32).row_us);
}

}  // namespace
}  // namespace attend
