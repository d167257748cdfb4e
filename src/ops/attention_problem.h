// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>
#include <vector>

#include "attend/ops/attention.h"
#include "kernels/cpu/attention/attention.h"

/// What flash_attn_varlen and flash_attn_with_kvcache share: checks that turn arguments into a
/// trusted problem, and running a plan over it.
namespace attend {
struct MlaDecodeArgs;
}
namespace attend::ops {

/// A cache or ragged K/V pair, as the caller gave it.
struct KvTensors {
  std::string_view k_name, v_name;  ///< argument names for errors
  ConstTensorView k, v;
  bool four_dims = false;  ///< [blocks or rows, tokens, Hkv, D] instead of [S, Hkv, D]
  bool writes_out = true;  ///< false: out must be undefined
};

/// Checks q, k, v, out against each other: dtypes, head counts and sizes, strides. `q` and `out`
/// have `q_rank` dimensions, the last two being heads and head size.
void check_qkv(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
               const ConstTensorView& out, int q_rank);

/// Heads, sizes, strides and overlaps of the same, whose ranks and dtypes have been checked.
void check_qkv_shapes(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
                      const ConstTensorView& out, int q_rank);

/// The same for fp8 keys and values: q any float type, out 16 or 32 bits.
void check_qkv_fp8(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
                   const ConstTensorView& out, int q_rank);

/// The same for int8 keys and values: q and out any float type that is computed in.
void check_qkv_int8(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
                    const ConstTensorView& out, int q_rank);

/// Checks a descale tensor, if it is defined; `allowed`: the tensor that it scales is fp8.
void check_descale(std::string_view op, std::string_view argument, const ConstTensorView& descale,
                   bool allowed, std::int64_t num_reqs, std::int64_t num_kv_heads);
cpu::Descale kernel_descale(const ConstTensorView& descale);

/// Checks scale, softcap, windows and slopes.
void check_params(std::string_view op, const AttentionParams& params, std::int64_t num_reqs,
                  std::int64_t num_q_heads);

/// Checks a block table: width against the lengths, ids of the blocks that a query can see.
void check_block_table(std::string_view op, const ConstTensorView& table, const AttentionPlan& plan,
                       int block_size, std::int64_t num_blocks);

/// Checks that requests for which the plan shares a prefix have the same blocks there. @pre
/// check_block_table passed.
void check_shared_blocks(std::string_view op, const ConstTensorView& table,
                         const AttentionPlan& plan, int block_size);

/// Checks a paged cache's block size: 1, 4, 8 or a multiple of 16.
void check_block_size(std::string_view op, std::string_view argument, const ConstTensorView& cache);

/// What a plan is compared with.
struct PlannedShape {
  ConstTensorView q;  ///< [T, Hq, D]
  std::int64_t num_kv_heads, head_dim_v;
  const AttentionParams& params;
  int branches = 1;
};

/// Checks that a plan was made for this shape and mask.
void check_planned_shape(std::string_view op, const AttentionPlan& plan, const PlannedShape& shape);

/// Checks that lengths that are given again, if they are, are the planned ones.
void check_planned_lengths(std::string_view op, std::string_view argument,
                           const ConstTensorView& lengths,
                           const std::vector<std::int32_t>& planned);

/// Checks that there are kernels for these types with the plan's arithmetic at its level.
/// @throws Unsupported.
void check_arithmetic(std::string_view op, const AttentionPlan& plan, DType q, DType k, DType v);

/// Checks that workspace and executor fit the plan.
void check_resources(std::string_view op, const AttentionPlan& plan, Workspace workspace,
                     const Executor& executor);

/// Head shape, dtype, parameters and lengths of a problem; addresses are left to the caller.
cpu::AttentionProblem base_problem(const AttentionParams& params, const AttentionPlan& plan,
                                   DType dtype);

/// Where queries and results lie: [T, Hq, D], [T, Hq, Dv] or undefined, [T, Hq] or undefined.
void place_rows(cpu::AttentionProblem& problem, const ConstTensorView& q, const TensorView& out,
                const TensorView& lse);

/// Checks all of mla_decode's tensors that no plan is needed for: not the lengths and the block
/// table. `op`: name that errors carry.
void check_mla_decode(std::string_view op, const MlaDecodeArgs& args);

/// How the rows of a cache of bytes become numbers; nothing for other caches.
cpu::CodedRows coded_rows(const ConstTensorView& cache) noexcept;

/// Where the rows of a latent cache lie, [num_blocks, block_size, E or bytes].
void place_latents(cpu::AttentionProblem& problem, const ConstTensorView& cache,
                   const ConstTensorView& block_table);

/// Runs all units, then all reductions. @pre everything above passed.
void run_plan(const cpu::AttentionProblem& problem, const AttentionPlan& plan, Workspace workspace,
              Executor& executor);

/// This thread's buffer for calls that bring no workspace, at least `bytes` large.
Workspace thread_workspace(std::size_t bytes);

}  // namespace attend::ops
