// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "serving/row_check.h"

namespace attend::serving {

/// A pair's row of a differential layer in float64, from the generator alone: both maps with their
/// LSEs, their difference, RMSNorm and factor. @pre model.differential is set.
ExpectedRow recompute_differential(const SampledRow& row, const ModelPreset& model,
                                   const ValueGenerator& generator, const KvStorage& storage);

}  // namespace attend::serving
