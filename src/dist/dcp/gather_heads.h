// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "attend/dist/communicator.h"

namespace attend::dcp {

/// Memory of gather_heads.
struct HeadBuffers {
  Buffer own, gathered, all;
};

/// Copies [T, H, D], last dimension stride 1, any strides of T and H.
void copy_heads(const TensorView& to, const ConstTensorView& from);

/// All-gathers the queries over heads: [T, H, D] of each rank, any strides of T and H, gives
/// [T, N * H, D], rank after rank, in `buffers`. A collective call. @pre q was checked.
TensorView gather_heads(const ConstTensorView& q, Communicator& comm, HeadBuffers& buffers);

}  // namespace attend::dcp
