// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/backend/differential.h"
#include "serving/content.h"
#include "serving/model_presets.h"

/// Generated weights of the layers of models with differential attention.
namespace attend::serving {

/// Lambda vectors of variance 0.01, as models begin with them, and a norm weight from 0.1 to 1.9 if
/// the model has one. lambda_init belongs to the layer's index in the model.
/// @pre model.differential is set.
DifferentialLayerConfig make_differential_layer(const ModelPreset& model, int layer,
                                                const ValueGenerator& generator);

}  // namespace attend::serving
