// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/ops/indexer_cache.h"

/// The indexer of sparse MLA (DeepSeek-V3.2) around its logits. What a layer does in a step, from
/// its projections on:
///
///   1. prepare_indexer(), then indexer_k_quant_and_cache() of the new keys;
///   2. indexer_short_rows(): query tokens that see no more tokens than are chosen need no logits;
///   3. the others: decodes fp8_paged_mqa_logits() and top_k_per_row_decode(); prefills
///      cp_gather_indexer_k_quant_cache(), fp8_mqa_logits() and top_k_per_row_prefill();
///   4. convert_req_index_to_global_index() of the chosen tokens, then sparse attention.
///
/// An executor of null is default_executor(). Everything is checked before anything is written.
namespace attend {

/// Arguments of prepare_indexer. T tokens, H >= 1 heads of 128 elements, of which the first 64 are
/// rotated. Inputs and outputs may have more than T rows; those are neither read nor written.
struct PrepareIndexerArgs {
  /// [T', H, 128] or [T', H * 128]: f32, f16 or bf16; last dimension stride 1. From the latent of
  /// the queries.
  ConstTensorView q;
  ConstTensorView k;          ///< [T', 128], dtype of q, last dimension stride 1: before its norm
  ConstTensorView weights;    ///< [T', H], f32 or dtype of q, last dimension stride 1
  ConstTensorView positions;  ///< i64 [T], contiguous, each in [0, max_pos)
  /// [max_pos, 64], last dimension stride 1: cosines of the 32 pairs, then their sines; dtype of q
  /// or f32.
  ConstTensorView cos_sin_cache;
  /// Pairs of elements: true = (i, i + 32) as GPT-NeoX, false = (2i, 2i + 1) as GPT-J.
  bool is_neox = true;
  ConstTensorView k_norm_weight, k_norm_bias;  ///< f32 [128], contiguous: LayerNorm of the keys
  float k_norm_eps = 1e-6F;                    ///< finite, > 0
  /// Multiplies q and k by the 128 x 128 Hadamard matrix times 128^-0.5, after the rotation.
  bool hadamard = false;
  IndexerScale q_scale_fmt = IndexerScale::ue8m0;
  std::optional<float> softmax_scale;  ///< finite; unset = 128^-0.5
  TensorView q_codes;                  ///< fp8_e4m3 [>= T, H, 128], last dimension stride 1
  TensorView weights_out;              ///< f32 [>= T, H], last dimension stride 1
  TensorView k_out;  ///< [>= T, 128], dtype of q, last dimension stride 1; may be k itself
};

/// What each step gives is rounded once to the dtype of q:
///   - k: LayerNorm over 128 elements, in float64 up to a result in float32;
///   - q and k: rotation, products and sum in float32;
///   - q and k, if asked for: the Hadamard transform, in float32.
/// Then the codes of q, one scale for each token and head: as indexer_k_quant_and_cache() makes
/// those of keys, but from max(amax, 1e-10) / 448. weights_out = weights * scale * softmax_scale *
/// H^-0.5, from left to right in float32. k_out is what indexer_k_quant_and_cache() takes.
/// @throws InvalidArgument (shapes, strides, dtypes, positions, numbers out of range, memory that
/// overlaps a result), before any write.
void prepare_indexer(const PrepareIndexerArgs& args, Executor* executor = nullptr);

/// Arguments of indexer_short_rows.
struct IndexerShortRowsArgs {
  /// i32 [T], contiguous: how many tokens each query token sees; less than 0 is 0.
  ConstTensorView lengths;
  TensorView out;  ///< i32 [T, k], k >= 1, any row stride, last dimension stride 1
};

/// Writes 0, 1, ... and then -1 for every row that sees no more than k tokens: what
/// top_k_per_row_prefill() and top_k_per_row_decode() choose for it whatever its logits are. Other
/// rows are not touched. Returns how many those are; 0 = nobody needs logits.
/// @throws InvalidArgument (shapes, dtypes, memory that overlaps the result), before any write.
std::int64_t indexer_short_rows(const IndexerShortRowsArgs& args, Executor* executor = nullptr);

}  // namespace attend
