// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// int8 codes for attention inputs. A code c stands for c * scale.
namespace attend {

/// What shares one scale. The numbers are those that the field's function takes as `mode`.
enum class Int8QuantMode : std::uint8_t {
  per_channel = 0,     ///< all tokens of one (head, element): values
  per_token_head = 2,  ///< all elements of one (token, head): queries and keys
};

/// Arguments of scaled_int8_quant_for_attn.
struct ScaledInt8QuantArgs {
  ConstTensorView input;  ///< [T, H, D] f32, f16 or bf16; last dimension stride 1
  TensorView output;      ///< i8 [T, H, D]; last dimension stride 1; memory of its own
  Int8QuantMode mode = Int8QuantMode::per_token_head;
  /// Written, f32, contiguous: [T, H] (per_token_head), [H, T] with transpose_scale, [H, D]
  /// (per_channel). Must be undefined if static_scale is given.
  TensorView scale;
  /// per_token_head only: `scale` has the tokens last, as prefill reads it.
  bool transpose_scale = false;
  /// per_channel only: f32 [H, D], contiguous, each finite and > 0, used instead of a computed
  /// scale. Undefined = compute.
  ConstTensorView static_scale = {};
  /// per_token_head only, smooth keys: f32 [H, D], contiguous, subtracted from every row before it
  /// is quantised; flash_attn_varlen_int8 takes it back in as k_mean. All rows of a cache that one
  /// query sees need the same mean. Undefined = nothing is subtracted.
  ConstTensorView mean = {};
};

/// Arguments of channel_mean.
struct ChannelMeanArgs {
  ConstTensorView input;      ///< [T, H, D] f32, f16 or bf16; last dimension stride 1
  ConstTensorView start_loc;  ///< i32 [B + 1], contiguous: rows of each request; 0 first, T last
  TensorView mean;            ///< written: f32 [B, H, D], contiguous; memory of its own
};

/// Mean over the tokens of each request, summed in float64; 0 for a request without tokens. What
/// keys have in common moves all logits of a row alike: without it they quantise with smaller
/// scales.
/// @throws InvalidArgument (shapes, dtypes, start_loc, shared memory), before any write.
void channel_mean(const ChannelMeanArgs& args, Executor* executor = nullptr);

/// Computes scale = max(amax / 127, 1e-6), amax being the largest magnitude of what shares it, and
/// codes = x / scale, divided in float32, rounded to the nearest integer (ties to even) and clamped
/// to
/// [-127, 127]. Without tokens a channel's scale is 1e-6.
///
/// What shares a computed scale with an infinity or NaN gets the scale NaN and codes 0, so that
/// whatever is computed from it is NaN, as it would be without quantisation; the rest of the batch
/// is unaffected. With static_scale an infinity saturates and NaN, for which there is no code, is
/// an error.
/// @throws InvalidArgument (shapes, dtypes, scales, shared memory, NaN with static_scale), before
/// any write.
void scaled_int8_quant_for_attn(const ScaledInt8QuantArgs& args, Executor* executor = nullptr);

}  // namespace attend
