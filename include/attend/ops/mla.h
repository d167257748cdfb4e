// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "attend/ops/attention.h"
#include "attend/ops/kernel_options.h"
#include "attend/plan/attention_plan.h"

/// Absorbed decode of multi-head latent attention: every query head attends to the rows of a latent
/// cache. A row of E elements is the key of all heads, its first L elements are their value;
/// queries are [absorbed part, L | rotated part, R], E = L + R. For sizes see MlaDims.
namespace attend {

/// Arguments of mla_decode. B requests, T query tokens, H heads.
struct MlaDecodeArgs {
  ConstTensorView q;  ///< [T, H, E]; last dimension stride 1
  /// [num_blocks, block_size, E]: dtype of q (f32, f16, bf16), fp8_e4m3 or fp8_e5m2. Or u8
  /// [num_blocks, block_size, bytes]: rows of a format of row_format.h; then q and out are bf16,
  /// and E and L are 576 and 512 for fp8_ds_mla (656 bytes), 512 and 512 for fp8_ds_v4 (584 bytes).
  /// block_size 1, 4, 8 or a multiple of 16; last dimension stride 1.
  ConstTensorView kv_cache;
  ConstTensorView block_table;      ///< i32 [B, max_blocks], stride 1 in the last dimension
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous
  ConstTensorView seq_lens;         ///< i32 [B], contiguous: keys per request
  TensorView out;  ///< [T, H, L], dtype of q; last dimension stride 1; must not overlap any input
  TensorView lse;  ///< f32 [T, H], natural log; undefined = not wanted
  /// f32, 1 element (rank 0 or 1), finite and > 0: an fp8 code stands for code * kv_scale. Required
  /// by fp8_e4m3 and fp8_e5m2 caches, undefined for others.
  ConstTensorView kv_scale;
  /// As of flash_attn_varlen, except that `scale` must be set: a model's scale is that of its heads
  /// before absorption, not 1 / sqrt(E).
  AttentionParams params;
};

/// Number of groups that the heads of a batch are cut into, a divisor of num_heads: a unit of work
/// has the heads of one group. Bits do not depend on it.
int mla_head_groups(int num_heads, int num_reqs, int num_workers) noexcept;

/// Plans mla_decode. `input`: num_q_heads = H, num_kv_heads = 1, head_dim_qk = E, head_dim_v = L.
/// The plan's num_kv_heads is the number of head groups.
/// @throws InvalidArgument, Unsupported as plan_attention().
AttentionPlan plan_mla_decode(AttentionPlanInput input);

/// Plans and runs in one call, as flash_attn_varlen() does.
/// @throws InvalidArgument; Unsupported for a level or an arithmetic that there is not. Both before
/// anything is written.
void mla_decode(const MlaDecodeArgs& args, Executor* executor = nullptr,
                const KernelOptions& kernels = {});

/// Runs a plan made for these lengths and sizes and this executor's number of workers.
/// query_start_loc and seq_lens may be undefined: the plan has them.
/// @pre workspace.size >= plan.workspace_bytes. No allocation.
/// @throws as above.
void mla_decode(const MlaDecodeArgs& args, const AttentionPlan& plan, Workspace workspace,
                Executor& executor);

/// Makes the checks of the overload above and nothing else. @throws as above.
void validate(const MlaDecodeArgs& args, const AttentionPlan& plan, Workspace workspace,
              const Executor& executor);

}  // namespace attend
