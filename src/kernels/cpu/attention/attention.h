// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/cache/row_format.h"
#include "attend/core/cpu.h"
#include "attend/core/dtype.h"
#include "attend/plan/attention_plan.h"
#include "kernels/cpu/attention/phase.h"
#include "plan/unit_layout.h"

/// Contract of the CPU attention kernels: one unit of a plan at a time, trusted input, no
/// allocation.
namespace attend::cpu {

/// Where row (request r, token i, head h) of a tensor lies, in elements.
struct RowLayout {
  bool ragged = true;  ///< true: token index is start[r] + i; false: r * stride_request + i
  std::int64_t stride_request = 0;
  std::int64_t stride_token = 0;
  std::int64_t stride_head = 0;
  std::int64_t offset(const std::int32_t* start, int r, std::int64_t i, int h) const noexcept {
    const std::int64_t row =
        ragged ? (start[r] + i) * stride_token : r * stride_request + i * stride_token;
    return row + h * stride_head;
  }
};

/// Strides of one key or value tensor, in elements.
struct KvStrides {
  std::int64_t block = 0;  ///< paged: block; dense: cache row; ragged: unused
  std::int64_t token = 0;
  std::int64_t head = 0;
};

/// How rows of bytes, with u8 as type, become numbers.
struct CodedRows {
  const RowFormat* format = nullptr;
  // If scales lie apart: blocks begin at the first key and so many bytes on, none below it.
  std::int64_t block_bytes = 0;
  int block_size = 0;
};

/// Factors of stored values per request, kv head and branch.
struct Descale {
  const float* data = nullptr;  ///< null = 1
  std::int64_t stride_request = 0, stride_head = 0, stride_branch = 0;
  float at(int r, int kv_head, int branch = 0) const noexcept {
    return data == nullptr
               ? 1.0F
               : data[r * stride_request + kv_head * stride_head + branch * stride_branch];
  }
};

/// What becomes of the two maps of a pair of heads: out = norm(map 1 - lambda * map 2).
struct PairTerms {
  float lambda = 0.0F;
  const void* token_lambda = nullptr;  ///< [T, pairs], of which the sigmoid is lambda; null = above
  DType token_lambda_dtype = DType::f32;
  std::int64_t token_lambda_stride_token = 0, token_lambda_stride_pair = 0;
  bool norm = false;
  const void* norm_weight = nullptr;  ///< [width]; null = ones
  DType norm_weight_dtype = DType::f32;
  float norm_eps = 0.0F;
  float out_scale = 1.0F;
};

/// Differential attention. A kv head is one that the maps of a pair share, or with two branches two
/// of them, whose rows and columns lie a constant offset behind those of the first.
struct DifferentialTerms {
  std::int64_t k_branch = 0, v_branch = 0;  ///< elements from a row of branch 0 to that of branch 1
  int pair_step = 2, map_step = 1;          ///< query head of (pair, map), from pair 0 and map 0
  bool writes_maps = false;  ///< out gets each map, [T, Hq, width], not what becomes of them
  PairTerms pair;
};

/// A validated problem: everything but which part of the work to do.
struct AttentionProblem {
  /// f32, f16 or bf16, all alike. Or codes as keys and values (fp8; int8 with scales a token): then
  /// q and out may be any float type. Or int8 q and k: then v is i8, f16 or bf16. Or u8 as k and v:
  /// rows of bytes, see CodedRows; then q and out may be any float type, strides are bytes.
  DType q_dtype = DType::f32, k_dtype = DType::f32, v_dtype = DType::f32, out_dtype = DType::f32;
  Descale q_descale, k_descale, v_descale;
  /// Scales of single keys and values, beside their rows; null = none.
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  KvStrides k_scale_strides, v_scale_strides;
  // int8 queries only.
  const float* q_scale = nullptr;
  RowLayout q_scale_layout;
  const float* v_channel_scale = nullptr;  ///< [Hkv, Dv], int8 values only
  std::int64_t v_channel_scale_stride = 0;
  const float* k_mean = nullptr;  ///< [B, Hkv, D] what is missing from the keys; null = nothing
  std::int64_t k_mean_stride_request = 0, k_mean_stride_head = 0;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;
  float* lse = nullptr;         ///< null = not wanted
  float* max_logits = nullptr;  ///< largest logit, natural units, no sink; null = not wanted
  RowLayout q_layout, out_layout, lse_layout, max_logits_layout;
  KvStrides k_strides, v_strides;
  /// Values are the first elements of the keys, as in a latent cache: v and its strides are those
  /// of k. Always so for rows of bytes.
  bool values_in_keys = false;
  CodedRows coded;
  /// [T, Hq, head_dim_v + plan::kCarryHeader] state that rows begin with or end in; null = off.
  float* carry = nullptr;
  int carry_heads = 0;                    ///< Hq
  const std::uint8_t* resumes = nullptr;  ///< [B]: rows begin with their state; null = none does
  bool keeps_state = false;               ///< rows end in their state, not in out and lse

  // Which row of the tensors key j of request r is: paged (block_table), else ragged (kv_start),
  // else dense (batch_idx, leftpad).
  const std::int32_t* block_table = nullptr;
  std::int64_t block_table_stride = 0;
  int block_size = 0;
  const std::int32_t* kv_start = nullptr;   ///< [B + 1]
  const std::int32_t* batch_idx = nullptr;  ///< [B] or null = identity
  const std::int32_t* leftpad = nullptr;    ///< [B] or null = 0

  const std::int32_t* query_start_loc = nullptr;  ///< [B + 1]
  const std::int32_t* seq_lens = nullptr;         ///< [B]
  const std::uint8_t* causal = nullptr;           ///< [B]
  int window_left = -1, window_right = -1;

  int group_size = 1;
  int head_dim_qk = 0, head_dim_v = 0;  ///< of a branch
  int maps = 1;      ///< 2: differential attention, the second half of a group is of map 2
  int branches = 1;  ///< of keys and values; 2 only with two maps
  DifferentialTerms differential;
  /// Columns of a row's result.
  int value_width() const noexcept { return branches * head_dim_v; }
  /// Query head of a member of a kv head's group.
  int head(int kv_head, int member) const noexcept {
    if (maps == 1) return kv_head * group_size + member;
    const int pairs = group_size / 2;
    return (kv_head * pairs + member % pairs) * differential.pair_step +
           member / pairs * differential.map_step;
  }
  float scale = 1.0F;
  float softcap = 0.0F;                 ///< 0 = off
  const float* alibi_slopes = nullptr;  ///< null = off
  std::int64_t alibi_stride_request = 0, alibi_stride_head = 0;
  bool alibi_sqrt = false;
  const float* sinks = nullptr;  ///< [Hq] natural units; null = off
  std::int64_t sink_stride = 0;
  bool lse_includes_sink = false;
};

/// Memory of one call: the partials of split units and each worker's scratch.
struct KernelWorkspace {
  float* partials = nullptr;  ///< [num_partial_rows, value_width() + kPartialHeader]
  float* scratch = nullptr;   ///< this worker's
  plan::ScratchLayout layout;
  const PartialRun* runs = nullptr;  ///< the plan's
  PhaseClock* clock = nullptr;       ///< this worker's; null = not measured
  /// This worker's next unit, whose first keys and values are fetched beside the end of this one;
  /// null = not known yet.
  const WorkUnit* following = nullptr;
  bool fetched = false;  ///< the unit before this one knew that this one follows
};

/// Computes a unit: writes out (and lse, max_logits), or partials of its pieces.
using RunUnitFn = void (*)(const AttentionProblem&, const WorkUnit&,
                           const KernelWorkspace&) noexcept;
/// Combines maps that the problem has as q, [T, Hq, width], for tokens [begin, end).
using CombineMapsFn = void (*)(const AttentionProblem&, int begin, int end) noexcept;
/// Merges partials of some rows, ascending, and writes out (and lse, max_logits).
using ReduceFn = void (*)(const AttentionProblem&, const Reduction&,
                          const KernelWorkspace&) noexcept;

/// One ISA level's kernels. Null: the level has none of its own, the next lower one serves.
struct AttentionKernel {
  IsaLevel isa = IsaLevel::scalar;
  // By the type of the keys; int8 ones have scales a token and meet queries of any float type.
  RunUnitFn run_unit_f32 = nullptr;
  RunUnitFn run_unit_f16 = nullptr;
  RunUnitFn run_unit_bf16 = nullptr;
  RunUnitFn run_unit_e4m3 = nullptr;
  RunUnitFn run_unit_e5m2 = nullptr;
  RunUnitFn run_unit_i8 = nullptr;
  RunUnitFn run_unit_coded = nullptr;
  // By the type of the outputs.
  ReduceFn reduce_f32 = nullptr;
  ReduceFn reduce_f16 = nullptr;
  ReduceFn reduce_bf16 = nullptr;
  CombineMapsFn combine_maps = nullptr;
  RunUnitFn run_unit(DType keys) const noexcept {
    switch (keys) {
      case DType::f32:
        return run_unit_f32;
      case DType::f16:
        return run_unit_f16;
      case DType::fp8_e4m3:
        return run_unit_e4m3;
      case DType::fp8_e5m2:
        return run_unit_e5m2;
      case DType::i8:
        return run_unit_i8;
      case DType::u8:
        return run_unit_coded;
      default:
        return run_unit_bf16;
    }
  }
  ReduceFn reduce(DType out) const noexcept {
    return out == DType::f32 ? reduce_f32 : out == DType::f16 ? reduce_f16 : reduce_bf16;
  }
};

/// One ISA level's kernels for int8 queries and keys; null as above. Their partials are reduced by
/// the above.
struct Int8AttentionKernel {
  IsaLevel isa = IsaLevel::scalar;
  // By the type of the values.
  RunUnitFn run_unit_i8 = nullptr;
  RunUnitFn run_unit_f16 = nullptr;
  RunUnitFn run_unit_bf16 = nullptr;
  RunUnitFn run_unit(DType values) const noexcept {
    return values == DType::i8 ? run_unit_i8 : values == DType::f16 ? run_unit_f16 : run_unit_bf16;
  }
};

/// What runs the units of a problem: the best kernel whose level is not above `level`.
RunUnitFn run_unit_of(IsaLevel level, const AttentionProblem& problem) noexcept;

/// What reduces partials to outputs of type `out`: the best kernel whose level is not above
/// `level`.
ReduceFn reduce_of(IsaLevel level, DType out) noexcept;

/// What combines maps: the best kernel whose level is not above `level`.
CombineMapsFn combine_maps_of(IsaLevel level) noexcept;

}  // namespace attend::cpu
