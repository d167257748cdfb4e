// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/tensor_view.h"

namespace attend {

/// Fills every row of output [T, H, D] and lse [T, H], which may be undefined, with what a row
/// without keys gives: a layer without metadata runs so, once at start-up.
void fill_profiling_output(const TensorView& output, const TensorView& lse);

}  // namespace attend
