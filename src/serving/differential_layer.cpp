// SPDX-License-Identifier: Apache-2.0
#include "serving/differential_layer.h"

#include <vector>

namespace attend::serving {

DifferentialLayerConfig make_differential_layer(const ModelPreset& model, int layer,
                                                const ValueGenerator& generator) {
  const auto generate = [&](int vector, int count, float mean, float factor) {
    std::vector<float> values(static_cast<std::size_t>(count));
    generator.fill_f32({.position = vector, .layer = layer, .kind = ValueKind::weight}, count,
                       values.data());
    for (float& x : values) x = mean + factor * x;
    return values;
  };
  DifferentialLayerConfig c;
  c.pairing = model.differential->pairing;
  int vector = 0;
  for (auto* lambda : {&c.lambda_q1, &c.lambda_k1, &c.lambda_q2, &c.lambda_k2})
    *lambda = generate(vector++, model.head_dim, 0.0F, 0.1F);
  c.lambda_init = differential_lambda_init(model.model_layer(layer));
  if (model.differential->norm_weight)
    c.norm_weight = generate(vector, 2 * model.head_dim, 1.0F, 0.5F);
  return c;
}

}  // namespace attend::serving
