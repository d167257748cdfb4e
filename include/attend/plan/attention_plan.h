// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "attend/core/cpu.h"
#include "attend/core/dtype.h"
#include "attend/plan/arithmetic.h"

namespace attend {

/// Keys are cut at multiples of this absolute position. Every piece gives an independent partial
/// result and pieces merge in ascending order: this is what makes an output row's bits independent
/// of batch, chunking, threads and split (docs/numerics.md).
inline constexpr int kPieceSize = 256;

/// Largest head sizes of queries and keys, and of values. Those of latent attention are as large.
inline constexpr int kMaxHeadDimQk = 576, kMaxHeadDimV = 512;
/// Largest head size of int8 queries and keys, and of their values.
inline constexpr int kMaxInt8HeadDim = 256;
/// Largest head size of differential attention, whose values are twice as wide.
inline constexpr int kMaxDifferentialHeadDim = 256;

/// Keys 0 .. num_keys of requests [request_begin, request_end) are the same rows of a paged cache.
struct SharedPrefix {
  std::int32_t request_begin = 0, request_end = 0;
  std::int32_t num_keys = 0;  ///< used down to a multiple of kPieceSize
};

/// What a plan is made for: one batch, one attention shape.
struct AttentionPlanInput {
  const char* op = "plan_attention";              ///< name that errors carry
  std::span<const std::int32_t> query_start_loc;  ///< [B + 1], starts with 0, non-decreasing
  std::span<const std::int32_t> seq_lens;         ///< [B] keys per request, >= 0
  int num_q_heads = 0;
  int num_kv_heads = 0;                          ///< divides num_q_heads
  int head_dim_qk = 0;                           ///< multiple of 8, <= kMaxHeadDimQk
  int head_dim_v = 0;                            ///< multiple of 8, <= kMaxHeadDimV
  bool causal = true;                            ///< bottom-right
  std::span<const std::uint8_t> request_causal;  ///< [B] or empty (= `causal` for all)
  int window_left = -1;                          ///< keys visible before the diagonal; -1 = all
  int window_right = -1;                         ///< keys visible after it; -1 = all (0 if causal)
  /// 2 = differential attention: num_kv_heads counts pairs of kv heads, num_q_heads is an even
  /// multiple of it, head_dim_v is that of a pair, 2 * head_dim_qk. See differential_plan_shape().
  int branches = 1;
  int num_workers = 1;          ///< workers of the executor that will run the plan
  int max_num_splits = 0;       ///< most parts along keys of a unit: 0 = as many as help, 1 = none
  std::optional<IsaLevel> isa;  ///< kernel level; unset = that of kernel_choice()
  /// What multiplies. A plan does not know the types of its tensors: an op that cannot serve them
  /// with this arithmetic at the level refuses the plan (kernel_level()).
  Arithmetic arithmetic = Arithmetic::automatic;
  /// Prefixes to attend to once for all requests that share them, or empty. Each lies beside those
  /// before it, or inside of one of them and is longer. The bits of no row depend on them.
  std::span<const SharedPrefix> shared_prefixes;
};

/// A part of the work that one worker does alone: query rows [q_begin, q_end) of one request, or of
/// several that share a prefix, and one kv head (with all query heads of its group) over pieces
/// [piece_begin, piece_end).
struct WorkUnit {
  std::int32_t request;  ///< the first one; its block table gives the keys of all
  std::int32_t kv_head;
  std::int32_t q_begin, q_end;          ///< query tokens, counted from the first one of `request`
  std::int32_t piece_begin, piece_end;  ///< kPieceSize keys each, absolute
  /// First row of its partials in the workspace; -1 = the unit covers all pieces of one request and
  /// writes the output itself.
  std::int64_t partial_slot;
  /// Rows from the partials of one piece to those of the next. 0 = the unit merges its pieces and
  /// stores one partial a row; no row then sees a key before its first piece.
  std::int64_t partial_stride;
};

/// Partials of consecutive pieces of a reduction's rows.
struct PartialRun {
  std::int64_t slot;    ///< of the reduction's first row in the first piece
  std::int64_t stride;  ///< rows from one piece to the next
  std::int32_t num_pieces;
};

/// Merge of the partials of some rows, in ascending order of pieces.
struct Reduction {
  std::int32_t request;
  std::int32_t kv_head;
  std::int32_t q_begin, q_end;      ///< query tokens, relative to the request
  std::int32_t run_begin, run_end;  ///< indices of AttentionPlan::partial_runs
};

/// Whether a unit or reduction is any work at all.
constexpr bool is_work(const WorkUnit& u) noexcept { return u.q_begin < u.q_end; }
constexpr bool is_work(const Reduction& r) noexcept { return r.q_begin < r.q_end; }

/// Host-built schedule of one batch; a value, free of any device. Made once per batch, used by
/// every layer of the same shape. An op refuses a plan that was made for other shapes.
struct AttentionPlan {
  std::vector<std::int32_t> query_start_loc;  ///< [B + 1]
  std::vector<std::int32_t> seq_lens;         ///< [B]
  std::vector<std::int32_t> key_start_loc;    ///< [B + 1] exclusive prefix sum of seq_lens
  std::vector<std::uint8_t> request_causal;   ///< [B]
  int num_q_heads = 0, num_kv_heads = 0, head_dim_qk = 0, head_dim_v = 0;
  int branches = 1;  ///< 2 = for differential_attention() alone
  int window_left = -1, window_right = -1;
  int num_workers = 1, max_num_splits = 0;
  IsaLevel isa = IsaLevel::scalar;  ///< highest level of the kernels that run it
  bool isa_given = false;           ///< its maker named the level: kernel_choice() has no say
  Arithmetic arithmetic = Arithmetic::automatic;  ///< as given

  /// Largest first. Those of an AotPlan end with units and reductions of zeros, which are no work.
  std::vector<WorkUnit> units;
  std::vector<Reduction> reductions;  ///< run after all units
  std::vector<PartialRun> partial_runs;
  std::vector<SharedPrefix> shared_prefixes;  ///< as given; an op checks them against its blocks
  int max_unit_rows = 0;                      ///< query rows (tokens * group) of the largest unit
  std::int64_t num_partial_rows = 0;          ///< rows of partial results that split units store
  std::size_t workspace_bytes = 0;            ///< partials and the workers' scratch together

  int num_reqs() const noexcept { return static_cast<int>(seq_lens.size()); }
  int num_tokens() const noexcept { return query_start_loc.empty() ? 0 : query_start_loc.back(); }
};

/// Makes a plan. @throws InvalidArgument for lengths, heads, head sizes, windows or shared prefixes
/// out of range; Unsupported if the ISA level is not available on this machine.
AttentionPlan plan_attention(const AttentionPlanInput& input);

}  // namespace attend
