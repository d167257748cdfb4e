// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/dist/communicator.h"
#include "attend/ops/attention.h"

/// Decode context parallelism (DCP): the cached tokens of every request are spread over the ranks
/// of a group. Every rank attends to its own part with the query heads of all ranks, and the
/// partial results are combined by their LSE. Same semantics as vLLM's functions of these names.
namespace attend {

/// How positions are spread: I = `interleave` consecutive ones to rank 0, the next I to rank 1, and
/// so on, around and around. A rank stores its tokens densely: local index l is its l-th token.
struct DcpLayout {
  int world_size = 1;  ///< N, ranks; >= 1
  int interleave = 1;  ///< I, tokens; >= 1
};

/// Rank that holds the token at `position`: (position / I) mod N.
/// @throws InvalidArgument for a negative position or a layout out of range.
int dcp_owner(std::int64_t position, const DcpLayout& layout);
/// Index of the token at `position` among the tokens of its owner: position / (N I) * I + position
/// mod I. @throws InvalidArgument as dcp_owner.
std::int64_t dcp_local_index(std::int64_t position, const DcpLayout& layout);
/// Inverse: position of token `local_index` of `rank`.
/// @throws InvalidArgument for a negative index, a rank outside [0, N) or a position beyond 2^63.
std::int64_t dcp_position(std::int64_t local_index, int rank, const DcpLayout& layout);

/// Number of tokens that `rank` holds of sequences of the given lengths.
/// seq_lens: [B], >= 0; local: [B], may be seq_lens itself.
/// @throws InvalidArgument (a negative length, sizes, rank, layout), before anything is written.
void dcp_local_seq_lens(std::span<const std::int32_t> seq_lens, int rank, const DcpLayout& layout,
                        std::span<std::int32_t> local);
/// The same for all ranks. local: [B, N], row-major, apart from seq_lens.
void dcp_local_seq_lens(std::span<const std::int32_t> seq_lens, const DcpLayout& layout,
                        std::span<std::int32_t> local);

/// Arguments of dcp_slot_mapping. B requests, T tokens.
struct DcpSlotMappingArgs {
  ConstTensorView positions;        ///< i64 [T], contiguous: absolute positions, >= 0
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous: 0, no decrease, T
  /// i32 [B, max_blocks], stride 1 in the last dimension. Entry j of a row is the block that holds,
  /// on every rank, that rank's share of positions [j * block_size * N, (j + 1) * block_size * N).
  ConstTensorView block_table;
  int block_size = 0;  ///< tokens a block holds on one rank; a positive multiple of the interleave
  DcpLayout layout;
  int rank = 0;             ///< 0 .. N - 1
  TensorView slot_mapping;  ///< i64 [>= T], contiguous; result
};

/// Slot (block * block_size + offset) where `rank` stores each token's key and value; -1 for tokens
/// of other ranks and for the entries from T on.
/// @throws InvalidArgument, before anything is written. Only table entries of this rank's own
/// tokens are read; a negative one is an error.
void dcp_slot_mapping(const DcpSlotMappingArgs& args);

/// Base of the logarithm of an LSE. The functions of this library give and take `e`.
enum class LseBase : std::uint8_t { e, two };

/// Arguments of the functions that combine partial attention. N ranks, T tokens; every rank brings
/// a partial result for the same tokens and heads, over other keys.
struct DcpCombineArgs {
  /// [T, H, D] f32, f16 or bf16: this rank's partial output. Last dimension: stride 1.
  ConstTensorView out;
  /// f32 [T, H], any strides. +inf, -inf and NaN: no visible key, that row of `out` is not read as
  /// a number (it may hold NaN).
  ConstTensorView lse;
  LseBase lse_base = LseBase::e;  ///< of lse and combined_lse
  /// [T, H / N, D] for the heads [rank * H / N, (rank + 1) * H / N), or [T, H, D] where all heads
  /// stay. dtype of `out`; last dimension: stride 1. Overlaps no input.
  TensorView combined;
  TensorView combined_lse;  ///< f32, shape of `combined` without D; undefined = not wanted
};

/// Combines by all-gathering the LSEs, weighing the own partial output and reduce-scattering over
/// heads: combined = sum_r e^(lse_r - L) out_r with L = log sum_r e^lse_r, in float32 in ascending
/// order of ranks, rounded once. All parts empty: combined 0, combined_lse -inf. A group of one
/// rank is no special case (out with empty rows zeroed, and its lse).
/// A collective call; all three functions give the same bits for the same heads.
/// @throws InvalidArgument, before anything is sent or written; CommunicatorAborted.
void cp_lse_ag_out_rs(const DcpCombineArgs& args, Communicator& communicator);
/// The same with all-reduce: every rank gets all heads.
void cp_lse_ag_out_ar(const DcpCombineArgs& args, Communicator& communicator);
/// The same result as cp_lse_ag_out_rs by two all-to-all exchanges, of outputs in their dtype and
/// of LSEs, and a local sum.
void dcp_a2a_lse_reduce(const DcpCombineArgs& args, Communicator& communicator);

/// Ways of combining in dcp_attention; the bits are the same.
enum class DcpCombine : std::uint8_t {
  all_gather_reduce_scatter,  ///< cp_lse_ag_out_rs
  all_to_all                  ///< dcp_a2a_lse_reduce
};

/// Arguments of dcp_attention: a step of decodes and short extends. N ranks, B requests, T query
/// tokens; Hq query heads on each rank, N * Hq in all: rank r has heads [r * Hq, (r + 1) * Hq).
/// Hkv kv heads, on every rank the same; head h of all reads kv head h / (N * Hq / Hkv).
/// dtype of q, caches, k_new, v_new, out: all f32, all f16 or all bf16, last dimension stride 1.
/// Lengths, flags, interleave, combine and parameters are the same on all ranks.
struct DcpAttentionArgs {
  ConstTensorView q;  ///< [T, Hq, D], this rank's heads; Hq <= 32768
  /// [num_blocks, block_size, Hkv, D], this rank's tokens; block_size 1, 4, 8 or a multiple of 16,
  /// and a multiple of `interleave`.
  ConstTensorView k_cache;
  ConstTensorView v_cache;  ///< like k_cache, with Dv
  /// [T, Hkv, D]: this step's keys, of all tokens and kv heads. They are read here, not from the
  /// cache, where the caller stores each rank's share (dcp_slot_mapping) before or after the call.
  ConstTensorView k_new;
  ConstTensorView v_new;            ///< like k_new, with Dv
  TensorView out;                   ///< [T, Hq, Dv]; overlaps no input
  TensorView lse;                   ///< f32 [T, Hq], natural log; undefined = not wanted
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous
  /// i32 [B], contiguous: tokens per request on all ranks together, this step's included.
  ConstTensorView seq_lens;
  ConstTensorView block_table;  ///< i32 [B, max_blocks], as in DcpSlotMappingArgs
  /// [B] or empty (= params.causal for all): 1 if the request's new tokens see no later new token.
  std::span<const std::uint8_t> request_causal;
  int interleave = 1;
  DcpCombine combine = DcpCombine::all_gather_reduce_scatter;
  /// scale, softcap and causal. Windows and ALiBi need positions that a rank's dense part does not
  /// have, and sinks would have to enter after the last step: Unsupported.
  AttentionParams params;
};

/// Attention over a context that is spread over the ranks. Steps:
///   1. all-gather the queries over heads: [T, N * Hq, D];
///   2. attention of all heads to this rank's part of the context, the tokens before this step's,
///      not causal (every query sees its whole context);
///   3. combine: [T, Hq, Dv] and LSE of the whole context, for this rank's heads;
///   4. attention of this rank's heads to this step's keys;
///   5. merge_attn_states of both.
/// A collective call. Nothing is sent or written before this rank's arguments are checked; a rank
/// whose call throws must abort the group, or the others wait for it (run_in_process does).
/// executor: default_executor() if null; kernels: the same on all ranks.
/// @throws InvalidArgument; Unsupported with every reason, also for a level or an arithmetic that
/// there is not (as flash_attn_varlen()); CommunicatorAborted.
void dcp_attention(const DcpAttentionArgs& args, Communicator& communicator,
                   Executor* executor = nullptr, const KernelOptions& kernels = {});

}  // namespace attend
