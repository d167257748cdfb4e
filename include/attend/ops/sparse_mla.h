// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <optional>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "attend/ops/kernel_options.h"
#include "attend/plan/attention_plan.h"

/// Absorbed attention of multi-head latent attention to keys that each query token names, as
/// DeepSeek-V3.2 does: mla_decode() where every token is a request of its own and its keys are the
/// named rows in the order of their names.
namespace attend {

/// Arguments of sparse_mla_attention. T query tokens, H heads.
struct SparseMlaArgs {
  ConstTensorView q;  ///< [T, H, E]; last dimension stride 1
  /// As in MlaDecodeArgs, but of any block size.
  ConstTensorView kv_cache;
  /// i32 [T, topk], topk >= 1, last dimension stride 1: slots (block * block_size + offset in the
  /// block) of a token's keys. A negative one, or one beyond the cache, names nothing. A slot that
  /// is named twice counts twice.
  ConstTensorView indices;
  /// i32 [T], any stride: the first so many indices of a token count; less than 0 is 0, more than
  /// topk is topk. Undefined = topk.
  ConstTensorView topk_length;
  TensorView out;  ///< [T, H, L], dtype of q; last dimension stride 1; must not overlap any input
  TensorView lse;  ///< f32 [T, H], natural log, without the sink; undefined = not wanted
  /// f32 [T, H]: largest scaled logit, without the sink; undefined = not wanted.
  TensorView max_logits;
  ConstTensorView kv_scale;  ///< as in MlaDecodeArgs
  ConstTensorView sinks;     ///< as in AttentionParams
  /// Multiplies the products; finite, > 0. Must be set: a model's scale is that of its heads before
  /// absorption.
  std::optional<float> scale;
};

/// What a plan is made for.
struct SparseMlaPlanInput {
  int num_tokens = 0;                             ///< T
  int topk = 0;                                   ///< indices a token, valid or not
  int num_heads = 0;                              ///< H
  int head_dim_qk = 0;                            ///< E
  int head_dim_v = 0;                             ///< L
  int num_workers = 1;                            ///< of the executor that will run it
  std::optional<IsaLevel> isa;                    ///< as in AttentionPlanInput
  Arithmetic arithmetic = Arithmetic::automatic;  ///< as in AttentionPlanInput
};

/// Schedule of sparse_mla_attention, good for any indices of its shape.
struct SparseMlaPlan {
  AttentionPlan attention;          ///< T requests of one token and topk keys
  int topk = 0;                     ///< as given
  std::size_t workspace_bytes = 0;  ///< that of the attention, and the table of valid indices
};

/// Makes a plan. @throws InvalidArgument, Unsupported as plan_mla_decode().
SparseMlaPlan plan_sparse_mla(const SparseMlaPlanInput& input);

/// Attends. A token without a key: out 0, lse and max_logits -infinity. Rows that no valid index
/// names are not read. Plans and runs in one call; workspace from an internal per-thread buffer,
/// executor default_executor() if null.
/// @throws InvalidArgument; Unsupported for a level or an arithmetic that there is not. Both before
/// anything is written.
void sparse_mla_attention(const SparseMlaArgs& args, Executor* executor = nullptr,
                          const KernelOptions& kernels = {});

/// Runs a plan made for these sizes and this executor's number of workers.
/// @pre workspace.size >= plan.workspace_bytes. No allocation.
/// @throws as above.
void sparse_mla_attention(const SparseMlaArgs& args, const SparseMlaPlan& plan, Workspace workspace,
                          Executor& executor);

/// Makes the checks of the overload above and nothing else. @throws as above.
void validate(const SparseMlaArgs& args, const SparseMlaPlan& plan, Workspace workspace,
              const Executor& executor);

}  // namespace attend
