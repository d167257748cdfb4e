// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/ops/mla_weights.h"

/// Packing of weights for the matrix kernels (kernels/cpu/matmul/matmul.h).
namespace attend::mla_pack {

/// Checks the arguments of from_kv_b_proj. @throws InvalidArgument
void validate(const KvBProjArgs& args);

/// The matrices of all heads, one size: depth x columns.
struct Matrices {
  void* data = nullptr;
  DType dtype = DType::f32;
  int depth = 0, columns = 0;

  std::int64_t elements_per_head() const noexcept;
};

/// Where a matrix is in the weight: element (k, n) of head h is row first_row + h * head_rows +
/// (transposed ? k : n), column (transposed ? n : k).
struct Source {
  std::int64_t first_row = 0, head_rows = 0;
  bool transposed = false;
};

/// Packs the matrices of all heads, converted to their dtype, on the executor of `args`. The
/// memory starts as zeros. @pre validate() passed
void pack(const KvBProjArgs& args, const Source& source, const Matrices& to);

/// Copies the matrix of each head to out[h]. @pre out is [H, depth, columns] of the same dtype,
/// last dimension stride 1
void unpack(const Matrices& from, const TensorView& out);

}  // namespace attend::mla_pack
