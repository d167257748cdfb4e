// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "attend/plan/attention_plan.h"

/// Attention over int8 queries and keys, multiplied as integers.
///
/// A code c stands for c * scale. Products of queries and keys are exact 32-bit sums; logits are
/// float32 from there on, and masks, softcap, biases and sinks work as in flash_attn_varlen.
/// - Level 1, int8 values: the weights of a row are rounded to n / 127 of the largest weight of
///   their 256-key piece, multiplied as integers, and the denominator is the sum of the rounded
///   weights. The LSE comes from the weights before rounding.
/// - Level 2, 16-bit values: weights and sums in float32.
/// A NaN among the scales makes what depends on it NaN and nothing else.
namespace attend {

/// Arguments of flash_attn_varlen_int8. B requests, T query tokens, Hq/Hkv heads, D/Dv head sizes.
/// Last dimension of q, k, v, v_scale and out: stride 1; everything else any strides.
struct FlashAttnVarlenInt8Args {
  ConstTensorView q;        ///< i8 [T, Hq, D]
  ConstTensorView q_scale;  ///< f32 [Hq, T]
  /// i8 [num_blocks, Hkv, block_size, D], block_size 1, 4, 8 or a multiple of 16.
  ConstTensorView k;
  ConstTensorView k_scale;  ///< f32 [num_blocks, Hkv, block_size]: the scale of each key
  /// [num_blocks, Hkv, block_size, Dv]: i8 (level 1), f16 or bf16 (level 2).
  ConstTensorView v;
  /// Level 1: f32 [Hkv, Dv], each finite and > 0. Level 2: undefined.
  ConstTensorView v_scale;
  /// Smooth keys: f32 [B, Hkv, D], stride 1 in the last dimension, 0 broadcasts in the first: what
  /// was subtracted from every key before quantising. It is counted, so that logits and LSE are
  /// those of the whole keys. Undefined = nothing was subtracted.
  ConstTensorView k_mean;
  TensorView out;                   ///< f32, f16 or bf16 [T, Hq, Dv]; must not overlap any input
  TensorView lse;                   ///< f32 [T, Hq], natural log; undefined = not wanted
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous
  ConstTensorView seq_lens;         ///< i32 [B], contiguous: keys per request
  ConstTensorView block_table;      ///< i32 [B, max_blocks], stride 1 in the last dimension
  AttentionParams params;
};

/// Plans and runs in one call; workspace from an internal per-thread buffer, executor
/// default_executor() if null.
/// @throws InvalidArgument, before anything is written.
void flash_attn_varlen_int8(const FlashAttnVarlenInt8Args& args, Executor* executor = nullptr,
                            std::optional<IsaLevel> isa = std::nullopt);

/// Runs a plan made for these lengths, heads, mask and this executor's number of workers.
/// query_start_loc and seq_lens may be undefined: the plan has them.
/// @pre workspace.size >= plan.workspace_bytes. No allocation.
/// @throws InvalidArgument; Unsupported unless the plan's arithmetic is automatic: integers have no
/// other. Both before anything is written.
void flash_attn_varlen_int8(const FlashAttnVarlenInt8Args& args, const AttentionPlan& plan,
                            Workspace workspace, Executor& executor);

/// Makes the checks of the overload above and nothing else. @throws InvalidArgument; Unsupported.
void validate(const FlashAttnVarlenInt8Args& args, const AttentionPlan& plan, Workspace workspace,
              const Executor& executor);

/// Arguments of paged_attention_int8 and paged_attention_mix: a batch of decodes, each request with
/// one or a few query tokens.
struct PagedAttentionInt8Args {
  ConstTensorView q;                ///< i8 [T, Hq, D]
  ConstTensorView q_scale;          ///< f32 [T, Hq]
  TensorView key_cache;             ///< i8 [num_blocks, Hkv, block_size, D]
  TensorView key_scale_cache;       ///< f32 [num_blocks, Hkv, block_size]
  TensorView value_cache;           ///< [num_blocks, Hkv, block_size, Dv]: i8; _mix: f16 or bf16
  ConstTensorView v_scale;          ///< f32 [Hkv, Dv], as above; _mix: undefined
  ConstTensorView k_mean = {};      ///< as above
  TensorView out;                   ///< f32, f16 or bf16 [T, Hq, Dv]
  TensorView lse = {};              ///< f32 [T, Hq] or undefined
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous
  ConstTensorView seq_lens;         ///< i32 [B], contiguous: keys per request, new ones included
  ConstTensorView block_table;      ///< i32 [B, max_blocks], stride 1 in the last dimension
  AttentionParams params = {};
  /// Fused save: written into the caches before anything is read, row i of request r at position
  /// seq_len - query_len + i. All three or none; [T, Hkv, D], [T, Hkv, Dv], f32 [T, Hkv], of the
  /// caches' dtypes, last dimension of the first two stride 1. A request then has at least as many
  /// keys as queries; if two rows go to one place the later wins.
  ConstTensorView save_key = {};
  ConstTensorView save_value = {};
  ConstTensorView save_key_scale = {};
};

/// Level 1: the same bits as reshape_and_cache_flash_int8 followed by flash_attn_varlen_int8.
/// @throws InvalidArgument, before anything is written.
void paged_attention_int8(const PagedAttentionInt8Args& args, Executor* executor = nullptr,
                          std::optional<IsaLevel> isa = std::nullopt);

/// Level 2, f16 or bf16 values.
/// @throws InvalidArgument, before anything is written.
void paged_attention_mix(const PagedAttentionInt8Args& args, Executor* executor = nullptr,
                         std::optional<IsaLevel> isa = std::nullopt);

}  // namespace attend
