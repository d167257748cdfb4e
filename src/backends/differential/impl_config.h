// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/backend/backend.h"

namespace attend::differential {

/// Checks the constants of a layer and returns the type of its cache.
/// @throws InvalidArgument naming the field that is out of range.
DType check_config(const ImplConfig& config);

/// How the layer's maps are combined, but for token_lambda. The view is of `config`, which must
/// have passed check_config() and live as long. @throws InvalidArgument if lambda is not finite.
DifferentialCombine make_combine(const ImplConfig& config);

}  // namespace attend::differential
