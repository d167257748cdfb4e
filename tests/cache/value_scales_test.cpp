// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/value_scales.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "attend/core/error.h"
#include "attend/ops/quant.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(ValueScaleCalibrationTest, KeepsTheLargestMagnitudeOfEachElementOverBatches) {
  ValueScaleCalibration calibration(2, 1, 3);
  const std::vector<float> first = {127, -2, 0, 1, 1, 0}, second = {-254, 1, 0}, other = {1, 1, 1};
  calibration.observe(0, {first.data(), DType::f32, {2, 1, 3}});
  calibration.observe(1, {other.data(), DType::f32, {1, 1, 3}});
  calibration.observe(0, {second.data(), DType::f32, {1, 1, 3}});
  calibration.observe(0, {second.data(), DType::f32, {0, 1, 3}});
  const ValueScales s = calibration.scales();
  EXPECT_EQ(s.num_layers, 2);
  EXPECT_EQ(s.num_kv_heads, 1);
  EXPECT_EQ(s.head_size, 3);
  EXPECT_EQ(s.scales,
            (std::vector<float>{2.0F, 2.0F / 127, 1e-6F, 1 / 127.0F, 1 / 127.0F, 1 / 127.0F}));
  EXPECT_EQ(describe(s.layer(1)), "[1, 3] f32 cpu:0");
  EXPECT_EQ(s.layer(1).as<float>(), s.scales.data() + 3);
  EXPECT_THROW(s.layer(2), InvalidArgument);
  EXPECT_THROW(s.layer(-1), InvalidArgument);
}

// One batch of everything gives what the dynamic mode of the quantiser computes from it, whatever
// the strides and the order of batches.
TEST(ValueScaleCalibrationTest, AgreesWithTheQuantiser) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  constexpr std::int64_t kTokens = 37, kHeads = 3, kDim = 16;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    HostTensor fused(dtype, {kTokens, 3, kHeads, kDim});
    fused.fill_normal(rng);
    const ConstTensorView value = fused.view().select(1, 2);
    HostTensor codes(DType::i8, {kTokens, kHeads, kDim});
    HostTensor want(DType::f32, {kHeads, kDim});
    scaled_int8_quant_for_attn(
        {.input = value, .output = codes, .mode = Int8QuantMode::per_channel, .scale = want});
    ValueScaleCalibration calibration(1, kHeads, kDim);
    calibration.observe(0, value.slice(0, 20, 17));
    calibration.observe(0, value.slice(0, 0, 20));
    const ValueScales got = calibration.scales();
    EXPECT_TRUE(std::ranges::equal(got.scales, want.as<float>())) << to_string(dtype);
  }
}

TEST(ValueScaleCalibrationTest, ABadBatchDoesNotCount) {
  ValueScaleCalibration calibration(1, 1, 2);
  const std::vector<float> good = {1, 1};
  calibration.observe(0, {good.data(), DType::f32, {1, 1, 2}});
  for (const float bad : {kInf, -kInf, kNan}) {
    const std::vector<float> batch = {500, 500, 1, bad};
    EXPECT_THROW(calibration.observe(0, {batch.data(), DType::f32, {2, 1, 2}}), InvalidArgument);
  }
  EXPECT_EQ(calibration.scales().scales, (std::vector<float>{1 / 127.0F, 1 / 127.0F}));
  try {
    const std::vector<float> batch = {0, 0, 1, kInf};
    calibration.observe(0, {batch.data(), DType::f32, {2, 1, 2}});
    FAIL() << "accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_STREQ(
        e.what(),
        "[ValueScaleCalibration::observe] argument 'value': expected finite values, got inf "
        "at index [1, 0, 1]");
  }
}

TEST(ValueScaleCalibrationTest, BadArguments) {
  EXPECT_THROW(ValueScaleCalibration(0, 1, 1), InvalidArgument);
  EXPECT_THROW(ValueScaleCalibration(1, 0, 1), InvalidArgument);
  EXPECT_THROW(ValueScaleCalibration(1, 1, -1), InvalidArgument);
  ValueScaleCalibration calibration(2, 1, 2);
  const std::vector<float> v = {1, 1};
  EXPECT_THROW(calibration.observe(2, {v.data(), DType::f32, {1, 1, 2}}), InvalidArgument);
  EXPECT_THROW(calibration.observe(-1, {v.data(), DType::f32, {1, 1, 2}}), InvalidArgument);
  EXPECT_THROW(calibration.observe(0, {v.data(), DType::f32, {1, 2, 1}}), InvalidArgument);
  EXPECT_THROW(calibration.observe(0, {v.data(), DType::i32, {1, 1, 2}}), InvalidArgument);
  calibration.observe(0, {v.data(), DType::f32, {1, 1, 2}});
  try {
    calibration.scales();
    FAIL() << "accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_STREQ(
        e.what(),
        "[ValueScaleCalibration::scales] argument 'value': expected observed values of every "
        "layer, got none of layer 1");
  }
}

}  // namespace
}  // namespace attend
