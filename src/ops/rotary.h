// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/tensor_view.h"

namespace attend::ops {

/// Rotation of head rows by position: cos and sin tables of [positions, rotary_dim / 2].
struct RotaryTables {
  ConstTensorView cos, sin;
  bool interleaved = true;  ///< pairs (0,1), (2,3)..; false: (i, i + rotary_dim / 2)
  bool defined() const noexcept { return cos.defined(); }
};

/// to = from rotated to `position`; plain copy without tables. `from` and `to` hold head_dim
/// contiguous elements of `dtype` and may be the same memory. The tables are of that dtype or f32.
/// Products and sum in float32, one rounding.
void rotate_row(const RotaryTables& tables, std::int64_t position, const void* from, void* to,
                std::int64_t head_dim, DType dtype) noexcept;

}  // namespace attend::ops
