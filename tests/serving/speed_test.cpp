// SPDX-License-Identifier: Apache-2.0
#include "serving/speed.h"

#include <gtest/gtest.h>

#include <vector>

namespace attend::serving {
namespace {

TEST(Speed, PureStepsGiveTheirOwnRates) {
  const std::vector<StepRecord> steps = {{.seconds = 9, .forward_seconds = 2, .prefill_flops = 4e9},
                                         {.seconds = 9, .forward_seconds = 4, .decode_bytes = 2e9}};
  const Speed s = measure_speed(steps, 10, 1);
  EXPECT_DOUBLE_EQ(s.prefill_gflops, 2);
  EXPECT_DOUBLE_EQ(s.decode_gbps, 0.5);
}

TEST(Speed, BothPartsOfAMixedStepGetTheSameShare) {
  // At the ceilings: 2 s of prefill and 1 s of decode; it took 6 s.
  const std::vector<StepRecord> steps = {
      {.seconds = 9, .forward_seconds = 6, .prefill_flops = 20e9, .decode_bytes = 3e9}};
  const Speed s = measure_speed(steps, 10, 3);
  EXPECT_DOUBLE_EQ(s.prefill_gflops / 10, 0.5);
  EXPECT_DOUBLE_EQ(s.decode_gbps / 3, 0.5);
}

TEST(Speed, WithoutCeilingsOnlyPureStepsCount) {
  const std::vector<StepRecord> steps = {
      {.seconds = 9, .forward_seconds = 2, .prefill_flops = 4e9},
      {.seconds = 9, .forward_seconds = 6, .prefill_flops = 20e9, .decode_bytes = 3e9}};
  const Speed s = measure_speed(steps, 0, 3);
  EXPECT_DOUBLE_EQ(s.prefill_gflops, 2);
  EXPECT_EQ(s.decode_gbps, 0);
}

TEST(Speed, NothingMeasuredIsZero) {
  EXPECT_EQ(measure_speed({}, 1, 1).prefill_gflops, 0);
  const std::vector<StepRecord> idle = {{.seconds = 1, .forward_seconds = 1}};
  EXPECT_EQ(measure_speed(idle, 1, 1).decode_gbps, 0);
}

TEST(Speed, PercentilesAreNearestRank) {
  std::vector<StepRecord> steps;
  for (int i = 100; i >= 1; --i) steps.push_back({.seconds = i * 1e-3});
  EXPECT_DOUBLE_EQ(step_percentile_ms(steps, 50), 50);
  EXPECT_DOUBLE_EQ(step_percentile_ms(steps, 99), 99);
  EXPECT_DOUBLE_EQ(step_percentile_ms(steps, 100), 100);
  EXPECT_DOUBLE_EQ(step_percentile_ms(std::vector<StepRecord>{{.seconds = 0.25}}, 99), 250);
  EXPECT_EQ(step_percentile_ms({}, 50), 0);
}

}  // namespace
}  // namespace attend::serving
