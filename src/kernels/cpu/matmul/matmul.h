// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/cpu.h"
#include "attend/core/dtype.h"

/// Contract of the CPU matrix kernels: products of rows with packed weights, one weight matrix a
/// head. Trusted input, no allocation.
///
/// Packed weights, the same on every level: a matrix of depth x columns lies as panels of
/// kPanelColumns columns, one after the other. Depth k of column n of a panel is element
/// k * kPanelColumns + n of it; for bf16, whose products want pairs, element
/// (k / 2 * kPanelColumns + n) * 2 + k % 2. Depth and columns are filled up with zeros, to
/// multiples of kDepthStep and kPanelColumns.
namespace attend::cpu {

inline constexpr int kPanelColumns = 32;
inline constexpr int kDepthStep = 32;
/// Most panels of a ProductPart.
inline constexpr int kMostPanels = 4;

/// out[t, h, n] = sum over k of a[t, h, k] * weights[h][k][n], in float32, rounded once.
struct BatchedProduct {
  DType dtype = DType::f32;  ///< of all three: f32, f16 or bf16
  int heads = 0, depth = 0, columns = 0;
  std::int64_t rows = 0;
  const void* a = nullptr;
  std::int64_t a_row = 0, a_head = 0;  ///< strides in elements; a_head 0 = one row for all heads
  const void* weights = nullptr;       ///< packed, head after head; aligned to 64 bytes
  void* out = nullptr;
  std::int64_t out_row = 0, out_head = 0;  ///< strides in elements

  std::int64_t panel_elements() const noexcept {
    return std::int64_t{kPanelColumns} * ((depth + kDepthStep - 1) / kDepthStep * kDepthStep);
  }
  int panels() const noexcept { return (columns + kPanelColumns - 1) / kPanelColumns; }
};

/// Rows and columns of a product that one call computes.
struct ProductPart {
  int head = 0;
  int panel_begin = 0, panel_end = 0;  ///< at least 1 panel, at most kMostPanels
  std::int64_t row_begin = 0, row_end = 0;
};

using MultiplyFn = void (*)(const BatchedProduct&, const ProductPart&);

/// What a level has; null = the kernel of the next lower level is used.
struct MatmulKernel {
  IsaLevel isa = IsaLevel::scalar;
  MultiplyFn multiply_f32 = nullptr, multiply_f16 = nullptr, multiply_bf16 = nullptr;
};

/// The kernel for a product of `dtype` on `level`. Never null.
MultiplyFn multiply_of(IsaLevel level, DType dtype) noexcept;

}  // namespace attend::cpu
