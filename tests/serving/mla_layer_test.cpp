// SPDX-License-Identifier: Apache-2.0
#include "serving/mla_layer.h"

#include <gmock/gmock.h>

#include <cmath>
#include <vector>

#include "attend/core/float_types.h"
#include "support/host_tensor.h"

namespace attend::serving {
namespace {

constexpr MlaDims kDims{64, 24, 8, 16};

std::vector<float> weight_row(const ValueGenerator& g, const WeightRow& row) {
  std::vector<float> weights(static_cast<std::size_t>(kDims.kv_lora_rank));
  fill_weight_row(g, kDims, row, weights.data());
  return weights;
}

TEST(MlaLayer, EveryRowOfEveryHeadAndLayerHasItsOwnWeights) {
  const ValueGenerator g(1, DType::f32);
  const auto base = weight_row(g, {.layer = 1, .head = 2, .row = 3});
  EXPECT_EQ(base, weight_row(g, {.layer = 1, .head = 2, .row = 3}));
  EXPECT_NE(base, weight_row(g, {.layer = 0, .head = 2, .row = 3}));
  EXPECT_NE(base, weight_row(g, {.layer = 1, .head = 1, .row = 3}));
  EXPECT_NE(base, weight_row(g, {.layer = 1, .head = 2, .row = 4}));
  EXPECT_NE(base, weight_row(ValueGenerator(2, DType::f32), {.layer = 1, .head = 2, .row = 3}));
}

TEST(MlaLayer, WeightsMakeKeysOfVarianceOne) {
  const ValueGenerator g(1, DType::bf16);
  double squares = 0;
  constexpr int kRows = 500;
  for (int row = 0; row < kRows; ++row) {
    for (const float w : weight_row(g, {.row = row})) {
      EXPECT_EQ(w, to_f32(to_bf16(w)));
      squares += static_cast<double>(w) * w;
    }
  }
  // Five standard deviations of the estimate.
  EXPECT_NEAR(squares / kRows, 1.0, 5 * std::sqrt(0.8 / (kRows * 64.0)));
}

TEST(MlaLayer, TheLayerHasTheWeightsOfItsHeads) {
  ModelPreset model;
  model.num_q_heads = 3;
  model.num_kv_heads = 1;
  model.mla = kDims;
  model.head_dim = kDims.cache_dim();
  const auto executor = make_thread_pool(2);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const ValueGenerator g(7, dtype);
    const auto weights = make_mla_weights(model, 5, g, *executor);
    EXPECT_EQ(weights->dims(), kDims);
    EXPECT_EQ(weights->num_heads(), 3);
    EXPECT_EQ(weights->dtype(), dtype);
    testing::HostTensor w_uk(dtype, {3, 24, 64}), w_uv(dtype, {3, 64, 16});
    weights->copy_w_uk_t(w_uk.view());
    weights->copy_w_uv(w_uv.view());
    for (int head = 0; head < 3; ++head) {
      for (int row = 0; row < 24 + 16; ++row) {
        const auto want = weight_row(g, {.layer = 5, .head = head, .row = row});
        for (int l = 0; l < 64; ++l) {
          const double got = row < 24 ? testing::get(w_uk, {head, row, l})
                                      : testing::get(w_uv, {head, l, row - 24});
          ASSERT_EQ(got, want[static_cast<std::size_t>(l)]) << head << " " << row << " " << l;
        }
      }
    }
  }
}

}  // namespace
}  // namespace attend::serving
