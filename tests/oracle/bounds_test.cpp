// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>

#include "attend/oracle/attention.h"

namespace attend::oracle {
namespace {

RowResult typical_row() {
  RowResult r;
  r.out = {0.5};
  r.abs_out = {0.75};
  r.lse = 6.0;
  r.logit_magnitude = 4.0;
  r.visible_keys = 300;
  return r;
}

TEST(OracleBounds, AreZeroWithoutVisibleKeys) {
  RowResult r = typical_row();
  r.visible_keys = 0;
  EXPECT_EQ(out_error_bound(r, 0, 128, DType::bf16), 0.0);
  EXPECT_EQ(lse_error_bound(r, 128), 0.0);
}

TEST(OracleBounds, OutputRoundingDominatesIn16Bit) {
  const RowResult r = typical_row();
  const double f32 = out_error_bound(r, 0, 128, DType::f32);
  const double f16 = out_error_bound(r, 0, 128, DType::f16);
  const double bf16 = out_error_bound(r, 0, 128, DType::bf16);
  EXPECT_NEAR(f16, f32 + 0.5 * std::ldexp(1.0, -11), 0.001 * f16);
  EXPECT_NEAR(bf16, f32 + 0.5 * std::ldexp(1.0, -8), 0.001 * bf16);
}

TEST(OracleBounds, ScaleWithTheValues) {
  const RowResult r = typical_row();
  RowResult scaled = r;
  scaled.out[0] *= 1024.0;
  scaled.abs_out[0] *= 1024.0;
  for (const DType t : {DType::f32, DType::f16, DType::bf16}) {
    EXPECT_DOUBLE_EQ(out_error_bound(scaled, 0, 64, t), 1024.0 * out_error_bound(r, 0, 64, t));
  }
}

TEST(OracleBounds, GrowWithLogitsBiasAndSoftcap) {
  const RowResult r = typical_row();
  const double out = out_error_bound(r, 0, 64, DType::f32);
  const double lse = lse_error_bound(r, 64);
  for (double RowResult::* field :
       {&RowResult::logit_magnitude, &RowResult::bias_magnitude, &RowResult::softcap}) {
    RowResult larger = r;
    larger.*field += 30.0;
    EXPECT_GT(out_error_bound(larger, 0, 64, DType::f32), out);
    EXPECT_GT(lse_error_bound(larger, 64), lse);
  }
}

TEST(OracleBounds, AreUsefulForOrdinaryRows) {
  const RowResult r = typical_row();
  EXPECT_LT(out_error_bound(r, 0, 128, DType::f32), 5e-4 * r.abs_out[0]);
  EXPECT_LT(lse_error_bound(r, 128), 5e-4);
}

}  // namespace
}  // namespace attend::oracle
