// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/dist/communicator.h"

/// The indexer of sparse MLA under decode context parallelism: the keys are spread over the ranks
/// of a group, and each rank has the logits of its own. What follows is attention to the tokens
/// that filter_and_convert_dcp_index() finds on each rank.
namespace attend {

/// Arguments of dcp_top_k. N ranks, T query tokens. Numbers of tokens are those of a rank, in the
/// order in which it stores them.
struct DcpTopKArgs {
  ConstTensorView logits;  ///< f32 [T, S] of this rank, any row stride, last dimension stride 1
  /// i32 [T], contiguous: column of a query token's first logit; undefined = all 0.
  ConstTensorView row_starts;
  /// i32 [T, k], k >= 1, the same k on all ranks, last dimension stride 1: what top_k_per_row_*
  /// chose of these logits. Each row ascends and ends with -1.
  ConstTensorView indices;
  /// i32 [T, k], any row stride, last dimension stride 1: positions in the whole request,
  /// ascending, and then -1.
  TensorView out;
  int interleave = 1;
};

/// Exchanges the chosen logits with their positions and chooses among those of all ranks: exactly
/// what top_k_per_row_* chooses of the logits of all tokens in order of position, since every token
/// of that choice is in the choice of its rank. Equal logits and NaN as there: the lower position
/// wins. All ranks get the same. Token l of rank r has position l / I * (N * I) + r * I + l mod I.
///
/// A collective call, see dist/mla.h: all ranks call it with the same T, k and interleave; nothing
/// is sent or written before a rank's arguments are checked. With N = 1 nothing is changed. An
/// executor of null is default_executor().
/// @throws InvalidArgument (shapes, dtypes, indices that are not as above or lead outside of the
/// logits, positions beyond the range of i32, memory that overlaps the result);
/// CommunicatorAborted.
void dcp_top_k(const DcpTopKArgs& args, Communicator& communicator, Executor* executor = nullptr);

}  // namespace attend
