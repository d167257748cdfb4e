// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// The tokens with the highest logits of each row: what the indexer of sparse MLA chooses. As
/// vLLM's functions of these names, which leave the order and the choice among equal logits open.
///
/// Equal logits (0 and -0 are equal): the lower index wins. NaN is below every number, -inf too,
/// and equal to itself. The chosen indices ascend, so that they depend on the set alone and cache
/// rows are read in the order of memory. A row with fewer logits than k has all of them and then
/// -1. A result depends on its row's logits only. An executor of null is default_executor().
/// Everything is checked before anything is written.
namespace attend {

/// Arguments of top_k_per_row_prefill.
struct TopKPerRowPrefillArgs {
  ConstTensorView logits;  ///< f32 [T, S], S < 2^31, any row stride, last dimension stride 1
  /// i32 [T], contiguous: row t has the logits [row_starts[t], row_ends[t]), within [0, S). Others
  /// are not read.
  ConstTensorView row_starts;
  ConstTensorView row_ends;
  /// i32 [T, k], k >= 1, any row stride, last dimension stride 1: indices from the row's start on.
  TensorView out;
};

/// @throws InvalidArgument (shapes, dtypes, a start after its end or outside of the logits, memory
/// that overlaps the result), before any write.
void top_k_per_row_prefill(const TopKPerRowPrefillArgs& args, Executor* executor = nullptr);

/// Arguments of top_k_per_row_decode.
struct TopKPerRowDecodeArgs {
  ConstTensorView logits;  ///< as above, T = B * next_n
  /// i32 [B], contiguous, each in [0, S]: tokens of each request, with this step's. Row b * next_n
  /// + n has the first seq_lens[b] - next_n + n + 1 logits, none if that is negative.
  ConstTensorView seq_lens;
  int next_n = 1;  ///< query tokens of each request; >= 1
  TensorView out;  ///< as above
};

/// @throws InvalidArgument likewise.
void top_k_per_row_decode(const TopKPerRowDecodeArgs& args, Executor* executor = nullptr);

}  // namespace attend
