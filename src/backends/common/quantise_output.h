// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

namespace attend {

/// codes[t, h, d] = the fp8_e4m3 code nearest to rows[t, h, d] / scale (float32 division),
/// saturating; NaN stays NaN. Each element depends on itself alone. @pre rows [T, H, >= V] f32, f16
/// or bf16, codes [T, H, V] fp8_e4m3, last dimensions of stride 1, no overlap; scale finite, > 0.
void quantise_output(const ConstTensorView& rows, float scale, const TensorView& codes,
                     Executor& executor);

}  // namespace attend
