// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

namespace attend {

/// Copies rows [n, heads or 1, R] to rows [n, heads, R] of the same type; last dimensions of stride
/// 1.
void copy_rope(const ConstTensorView& from, const TensorView& to, Executor& executor);

}  // namespace attend
