// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/dist/communicator.h"
#include "attend/dist/decode_context_parallel.h"
#include "attend/ops/attention.h"
#include "attend/ops/differential.h"

/// Differential attention under decode context parallelism: dcp_attention() for layers whose heads
/// come in pairs.
namespace attend {

/// Arguments of dcp_differential_attention. N ranks, B requests, T query tokens; Hq query heads on
/// each rank, an even number. Rank r has pairs [r * Hq / 2, (r + 1) * Hq / 2) of all N * Hq / 2:
/// with interleaved pairing heads [r * Hq, (r + 1) * Hq) of all; with halves heads p and
/// p + N * Hq / 2 of all for each of those pairs p, in this order: all first, then all second ones.
/// Hk kv heads, on every rank the same; pair p of all reads kv pair p / (N * Hq / Hk), of variant
/// v2 kv head p / (N * Hq / 2 / Hk).
/// dtype of q, caches, k_new, v_new, out: all f32, all f16 or all bf16, last dimension stride 1.
/// Lengths, flags, interleave, exchange, variant, pairing and parameters are the same on all ranks.
struct DcpDifferentialAttentionArgs {
  ConstTensorView q;  ///< [T, Hq, D], this rank's heads; Hq <= 32768
  /// v1 [2, num_blocks, block_size, Hk / 2, D], the two branches; v2 [num_blocks, block_size, Hk,
  /// D]. This rank's tokens; block_size as in DcpAttentionArgs.
  ConstTensorView k_cache;
  ConstTensorView v_cache;  ///< shape of k_cache
  /// [T, Hk, D]: this step's keys and values, of all tokens and kv heads, paired by `pairing`. They
  /// are read here, not from the cache.
  ConstTensorView k_new, v_new;
  TensorView out;  ///< v1 [T, Hq, D], v2 [T, Hq / 2, D], as DifferentialAttentionArgs::out
  TensorView lse;  ///< f32 [T, Hq], natural log, of both maps, by head of q; undefined = none
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous
  /// i32 [B], contiguous: tokens per request on all ranks together, this step's included.
  ConstTensorView seq_lens;
  ConstTensorView block_table;  ///< i32 [B, max_blocks], as in DcpSlotMappingArgs
  /// [B] or empty (= params.causal for all): 1 if the request's new tokens see no later new token.
  std::span<const std::uint8_t> request_causal;
  int interleave = 1;
  DcpCombine exchange = DcpCombine::all_gather_reduce_scatter;
  DifferentialVariant variant = DifferentialVariant::v1;
  HeadPairing pairing = HeadPairing::interleaved;
  DifferentialCombine combine;  ///< token_lambda [T, Hq / 2]: of this rank's pairs
  AttentionParams params;       ///< as in DcpAttentionArgs
};

/// The steps of dcp_attention() with the normalised maps in place of results, and
/// differential_combine() after the last: the maps of a pair are subtracted when they have seen all
/// keys. Maps are float32 from kernel to combination, in the exchange too; rounded once, at the
/// end. A collective call, as dcp_attention(): this rank's arguments are checked before anything is
/// sent or written.
/// @throws InvalidArgument; Unsupported with every reason, as dcp_attention() and
/// differential_attention(); CommunicatorAborted.
void dcp_differential_attention(const DcpDifferentialAttentionArgs& args,
                                Communicator& communicator, Executor* executor = nullptr,
                                const KernelOptions& kernels = {});

}  // namespace attend
