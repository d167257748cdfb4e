// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "attend/ops/kernel_options.h"
#include "attend/plan/attention_plan.h"

/// Scaled dot-product attention over ragged or paged keys and values.
///
/// logit(i, j) = q_i . k_j * scale, then softcap, then the ALiBi bias, then the mask; softmax over
/// the visible j; out_i = sum_j p_ij v_j. Query i of a request (0-based, of query_len) stands at
/// absolute position i + seq_len - query_len (bottom-right alignment). Query head h reads kv head
/// h / (Hq / Hkv). All sums in float32. A row without a visible key: out 0, lse -infinity.
/// A sink is one more logit without a value: it takes its share of the softmax and adds nothing.
namespace attend {

/// How logits become probabilities.
struct AttentionParams {
  std::optional<float> scale;  ///< multiplies q.k; finite, > 0; unset = 1 / sqrt(head_dim_qk)
  bool causal = false;         ///< key j visible to position p only if j <= p
  int window_left = -1;        ///< keys p - window_left .. p visible; -1 = all
  int window_right = -1;       ///< keys p .. p + window_right visible; -1 = all; ignored if causal
  float softcap = 0.0F;        ///< logits become softcap * tanh(logits / softcap); 0 = off
  /// f32 [Hq] or [B, Hq]; undefined view = off. Bias: -slope * |position - j|.
  ConstTensorView alibi_slopes;
  /// Bias -slope * sqrt(position - j) for keys up to the position and 0 after it, instead of the
  /// above (sqrt-ALiBi; the definition of vLLM's Triton kernels). Has no effect without slopes.
  bool alibi_sqrt = false;
  /// f32 [Hq]: a logit per head, neither scaled nor capped; -infinity = none for that head, NaN and
  /// +infinity are refused; undefined view = off.
  ConstTensorView sinks;
  /// true: lse counts the sink (FlashAttention 3's convention; a row without a visible key then has
  /// lse = sink). false: it does not, so that partial results merge and the sink enters once.
  bool lse_includes_sink = false;
};

/// Sums of query rows whose keys come in several calls. The calls have the bits of one call over
/// all keys if each but the last brings a multiple of kPieceSize keys a request, all of them
/// visible. Positions, and with them masks and ALiBi, count from the first key of the call at hand.
struct AttentionCarry {
  /// f32 [T', Hq, Dv + 2], contiguous: running maximum and sum, then the weighted values. What it
  /// holds is for these calls alone. T' >= T; with `last` the rows behind those of the last request
  /// that resumes may be missing. Undefined = off.
  TensorView state;
  /// u8 [B], contiguous: not 0 = the request goes on from its state, 0 = it begins and its state is
  /// not read. Undefined = all begin.
  ConstTensorView resumes;
  /// true: out and lse are written and the state is only read. false: the state is written, out and
  /// lse must be undefined. Requests without a visible key in this call keep what they had.
  bool last = true;
};

/// Arguments of flash_attn_varlen. B requests, T query tokens, Hq/Hkv heads, D/Dv head sizes.
/// dtype of q, k, v, out: all f32, all f16 or all bf16. Or k and v both fp8_e4m3 or both fp8_e5m2:
/// then q is any of the five and out f32, f16 or bf16 (that of q, unless q is fp8). Or k and v both
/// i8 with token scales, then q and out are f32, f16 or bf16, alike. Last dimension of each:
/// stride 1.
struct FlashAttnVarlenArgs {
  ConstTensorView q;  ///< [T, Hq, D]
  /// Ragged: [S, Hkv, D]. Paged (block_table defined): [num_blocks, block_size, Hkv, D], block_size
  /// 1, 4, 8 or a multiple of 16; NHD and HND are just strides.
  ConstTensorView k;
  ConstTensorView v;                ///< like k, with Dv
  TensorView out;                   ///< [T, Hq, Dv]; must not overlap any input
  TensorView lse;                   ///< f32 [T, Hq], natural log; undefined = not wanted
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous
  /// i32 [B + 1], contiguous: request r has keys cu_seqlens_kv[r] .. cu_seqlens_kv[r + 1].
  /// Exactly one of cu_seqlens_kv and (seq_lens and block_table) is given.
  ConstTensorView cu_seqlens_kv;
  ConstTensorView seq_lens;     ///< i32 [B], contiguous: keys per request, paged only
  ConstTensorView block_table;  ///< i32 [B, max_blocks], stride 1 in the last dimension
  /// f32 [B, Hkv], any strides (0 broadcasts), finite and > 0: real value = stored value * descale,
  /// for q by the kv head of its group. Undefined = 1. q_descale only with fp8 q, the others only
  /// with fp8 k and v.
  ConstTensorView q_descale, k_descale, v_descale;
  /// Scales of single keys and values: f32, the shape of k without its last dimension, any strides;
  /// real value = stored value * scale. Both with i8 k and v; with fp8 ones both or neither,
  /// besides the descales; else undefined. A NaN makes the rows NaN that see that key.
  ConstTensorView k_token_scale, v_token_scale;
  AttentionCarry carry;
  AttentionParams params;
};

/// Plans and runs in one call; workspace from an internal per-thread buffer, executor
/// default_executor() if null. For one call per batch; servers plan once and use the overload
/// below.
/// @throws InvalidArgument; Unsupported for a level or an arithmetic that there is not (the types
/// of q, k and v decide, see kernel_level()). Both before anything is written.
void flash_attn_varlen(const FlashAttnVarlenArgs& args, Executor* executor = nullptr,
                       const KernelOptions& kernels = {});

/// Runs a plan made for these lengths, heads, mask and this executor's number of workers.
/// query_start_loc, seq_lens and cu_seqlens_kv may be undefined: the plan has them (cu_seqlens_kv
/// is then the prefix sum of the plan's seq_lens).
/// @pre workspace.size >= plan.workspace_bytes. No allocation.
/// @throws InvalidArgument; Unsupported for the plan's arithmetic, as above. Both before anything
/// is written.
void flash_attn_varlen(const FlashAttnVarlenArgs& args, const AttentionPlan& plan,
                       Workspace workspace, Executor& executor);

/// Makes the checks of the overload above and nothing else, for callers that write something of
/// their own (a cache) between the checks and the run. Reads no key, value or query.
/// @throws InvalidArgument; Unsupported.
void validate(const FlashAttnVarlenArgs& args, const AttentionPlan& plan, Workspace workspace,
              const Executor& executor);

/// Arguments of flash_attn_with_kvcache: Sq query tokens of each of B requests against a cache,
/// with optional append of Snew new rows and rotary embedding.
struct FlashAttnWithKvCacheArgs {
  ConstTensorView q;  ///< [B, Sq, Hq, D]
  /// Dense: [Bc, Smax, Hkv, D]. Paged (block_table defined): [num_blocks, block_size, Hkv, D].
  TensorView k_cache;
  TensorView v_cache;     ///< like k_cache, with Dv
  ConstTensorView k_new;  ///< [B, Snew, Hkv, D]; undefined = nothing to append
  ConstTensorView v_new;  ///< [B, Snew, Hkv, Dv]; given iff k_new is
  TensorView out;         ///< [B, Sq, Hq, Dv]
  TensorView lse;  ///< f32 [B, Hq, Sq], natural log (flash-attn's layout); undefined = not wanted
  /// i32 [B]: rows valid in the cache before the append (without k_new: all visible rows). With
  /// cache_leftpad these counts include the padding. Undefined = the whole dense cache.
  ConstTensorView cache_seqlens;
  ConstTensorView cache_batch_idx;  ///< i32 [B]: row of the dense cache; undefined = identity
  ConstTensorView cache_leftpad;    ///< i32 [B]: first valid row; undefined = 0. Dense cache only
  ConstTensorView block_table;  ///< i32 [B, max_blocks]; excludes cache_batch_idx and cache_leftpad
  /// [Smax_rotary, rotary_dim / 2], dtype of q; rotary_dim a multiple of 16, <= D. New keys rotate
  /// by their position cache_seqlens + i; queries likewise if causal or windowed, else by
  /// cache_seqlens. Given only together with k_new.
  ConstTensorView rotary_cos, rotary_sin;
  bool rotary_interleaved = true;  ///< pairs (0,1),(2,3).. (GPT-J); false: (0,D/2).. (NeoX)
  AttentionParams params;
};

/// Appends, rotates and attends, like flash-attn's function of that name.
/// @throws InvalidArgument; Unsupported as flash_attn_varlen(). Both before anything is written.
void flash_attn_with_kvcache(const FlashAttnWithKvCacheArgs& args, Executor* executor = nullptr,
                             const KernelOptions& kernels = {});

}  // namespace attend
