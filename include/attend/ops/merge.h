// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

namespace attend {

/// Arguments of merge_attn_states. Partial LSE: +inf, -inf and NaN all mean "no visible key". Last
/// dimension of out, prefix_out and suffix_out: stride 1.
struct MergeAttnStatesArgs {
  TensorView out;  ///< [T, H, D] f32, f16 or bf16; may be exactly prefix_out or suffix_out
  /// f32 [T, H], any strides; may be exactly prefix_lse or suffix_lse; undefined = not wanted
  TensorView lse;
  ConstTensorView prefix_out;  ///< [T, H, D], dtype of out
  ConstTensorView prefix_lse;  ///< f32 [T, H], any strides
  ConstTensorView suffix_out;  ///< [T, H, D], dtype of out
  ConstTensorView suffix_lse;  ///< f32 [T, H], any strides
  /// Tokens [0, n) have a prefix; the prefix of the rest counts as empty and is not read, so that
  /// they take the suffix as it is. -1 = all tokens have one.
  int prefill_tokens_with_context = -1;
};

/// Merges two partial attention results over disjoint keys: out = a*prefix + b*suffix with weights
/// e^(lse - merged lse), in float32. Both empty: out 0, lse -inf. An empty side is never read as a
/// number (its rows may hold NaN).
/// @throws InvalidArgument, before anything is written.
void merge_attn_states(const MergeAttnStatesArgs& args, Executor* executor = nullptr);

}  // namespace attend
