// SPDX-License-Identifier: Apache-2.0
#include "serving/differential_layer.h"

#include <gmock/gmock.h>

#include <cmath>
#include <set>
#include <vector>

namespace attend::serving {
namespace {

TEST(DifferentialLayer, EveryVectorOfEveryLayerIsItsOwn) {
  const ModelPreset& phi = find_model("phi-4-mini-flash");
  const ValueGenerator g(1, DType::bf16);
  std::set<std::vector<float>> vectors;
  for (int layer = 0; layer < phi.num_layers; ++layer) {
    const DifferentialLayerConfig c = make_differential_layer(phi, layer, g);
    EXPECT_EQ(c.lambda_q1, make_differential_layer(phi, layer, g).lambda_q1);
    for (const auto& v : {c.lambda_q1, c.lambda_k1, c.lambda_q2, c.lambda_k2}) {
      EXPECT_EQ(v.size(), 64U);
      vectors.insert(v);
    }
    EXPECT_EQ(c.norm_weight.size(), 128U);
    vectors.insert(c.norm_weight);
  }
  EXPECT_EQ(vectors.size(), 5U * 16U);
}

TEST(DifferentialLayer, LambdasHaveTheirVarianceAndWeightsTheirRange) {
  const ModelPreset& phi = find_model("phi-4-mini-flash");
  double squares = 0, weights = 0;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const auto c = make_differential_layer(phi, 3, ValueGenerator(seed, DType::f32));
    for (const auto& v : {c.lambda_q1, c.lambda_k1, c.lambda_q2, c.lambda_k2})
      for (const float x : v) squares += static_cast<double>(x) * static_cast<double>(x);
    for (const float w : c.norm_weight) {
      EXPECT_GT(w, 0.1F);
      EXPECT_LT(w, 1.9F);
      weights += static_cast<double>(w);
    }
  }
  // Five standard deviations of the estimates: a square of variance 1 deviates by 0.9, a weight by
  // 0.5.
  EXPECT_NEAR(squares / (50 * 4 * 64), 0.01, 5 * 0.009 / std::sqrt(50 * 4 * 64.0));
  EXPECT_NEAR(weights / (50 * 128), 1.0, 5 * 0.5 / std::sqrt(50 * 128.0));
}

TEST(DifferentialLayer, LambdaInitBelongsToTheLayerOfTheModel) {
  const ValueGenerator g(1, DType::bf16);
  const auto init = [&](const ModelPreset& m, int layer) {
    return make_differential_layer(m, layer, g).lambda_init;
  };
  const ModelPreset& phi = find_model("phi-4-mini-flash");
  const ModelPreset four = with_layers(phi, 4);
  for (const auto& [layer, model_layer] : {std::pair{0, 1}, {1, 3}, {2, 17}, {3, 19}})
    EXPECT_NEAR(init(four, layer), 0.8 - 0.6 * std::exp(-0.3 * model_layer), 1e-15) << layer;
  EXPECT_NEAR(init(phi, 15), 0.8 - 0.6 * std::exp(-0.3 * 31), 1e-15);
  EXPECT_NEAR(init(find_model("diffllama"), 2), 0.8 - 0.6 * std::exp(-0.6), 1e-15);
}

TEST(DifferentialLayer, HasThePairingAndTheNormOfTheModel) {
  const ValueGenerator g(1, DType::bf16);
  const auto phi = make_differential_layer(find_model("phi-4-mini-flash"), 0, g);
  const auto llama = make_differential_layer(find_model("diffllama"), 0, g);
  EXPECT_EQ(phi.pairing, HeadPairing::interleaved);
  EXPECT_EQ(llama.pairing, HeadPairing::halves);
  EXPECT_TRUE(llama.norm_weight.empty());
  for (const auto* c : {&phi, &llama}) {
    EXPECT_EQ(c->variant, DifferentialVariant::v1);
    EXPECT_TRUE(c->norm);
    EXPECT_FALSE(c->lambda_rounding.has_value());
  }
}

}  // namespace
}  // namespace attend::serving
