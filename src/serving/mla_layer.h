// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>

#include "attend/core/executor.h"
#include "attend/ops/mla_weights.h"
#include "serving/content.h"
#include "serving/model_presets.h"

/// Generated weights of the layers of MLA models.
namespace attend::serving {

/// Names one row of a layer's projection: rows 0 .. P - 1 of a head make its key, the V behind them
/// its value.
struct WeightRow {
  int layer = 0, head = 0, row = 0;
};

/// Writes the L weights of the row, of variance 1 / L, so that latents of variance 1 make keys and
/// values of variance 1: rounded to the generator's dtype, as float32.
void fill_weight_row(const ValueGenerator& generator, const MlaDims& dims, const WeightRow& row,
                     float* weights);

/// All heads of a layer. @pre model.mla is set.
std::shared_ptr<const MlaWeights> make_mla_weights(const ModelPreset& model, int layer,
                                                   const ValueGenerator& generator,
                                                   Executor& executor);

}  // namespace attend::serving
