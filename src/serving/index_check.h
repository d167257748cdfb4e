// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

#include "serving/row_check.h"

namespace attend::serving {

/// What is wrong with the tokens that the indexer chose for a row, whose logits are computed here
/// in float64 from the generator alone; empty = nothing: they are as many as there can be,
/// ascending, and none has a logit that is surely below that of a token left out. @pre
/// model.indexer is set.
std::string check_chosen(const SampledRow& row, const ModelPreset& model,
                         const ValueGenerator& generator);

}  // namespace attend::serving
