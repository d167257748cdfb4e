// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "serving/row_check.h"

namespace attend::serving {

/// A row of an MLA layer in float64, from the generator alone, by the path that it went. Latents
/// and rotated keys are rounded as the cache stores them: MLA back ends read all keys from there,
/// those of the step's own tokens too. @pre model.mla is set.
ExpectedRow recompute_mla(const SampledRow& row, const ModelPreset& model,
                          const ValueGenerator& generator, const KvStorage& storage);

}  // namespace attend::serving
