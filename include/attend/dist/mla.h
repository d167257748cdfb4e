// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/dist/communicator.h"
#include "attend/dist/decode_context_parallel.h"
#include "attend/ops/attention.h"
#include "attend/ops/kernel_options.h"

/// Multi-head latent attention (MLA) under decode context parallelism: the rows of the latent cache
/// are spread over the ranks of a group, one for all heads, and the query heads too. What a rank
/// does in a step of a layer:
///
///   1. dcp_slot_mapping() of all new tokens, then concat_and_cache_mla() of all new rows: those of
///      other ranks have slot -1 and are skipped;
///   2. decodes: absorb_query(), dcp_mla_decode() and v_up_project(), all for its own heads;
///   3. prefills: dcp_gather_latents() of a chunk of the context, then up_project() and attention,
///      for its own heads, as on a single rank.
///
/// Both functions are collective calls: every rank makes them in the same order with the same
/// lengths, interleave, combine and parameters. Nothing is sent or written before a rank's
/// arguments are checked; a rank whose call throws must abort the group, or the others wait for it
/// (run_in_process does). An executor of null is default_executor().
namespace attend {

/// Arguments of dcp_mla_decode. N ranks, B requests, T query tokens; Hq heads on each rank, N * Hq
/// in all: rank r has heads [r * Hq, (r + 1) * Hq). Sizes as in MlaDecodeArgs.
struct DcpMlaDecodeArgs {
  ConstTensorView q;  ///< [T, Hq, E], absorbed queries of this rank's heads; Hq <= 32768
  /// This rank's rows, in any format of MlaDecodeArgs, those of this step among them. block_size a
  /// multiple of `interleave`, too.
  ConstTensorView kv_cache;
  ConstTensorView block_table;      ///< i32 [B, max_blocks], as in DcpSlotMappingArgs
  ConstTensorView query_start_loc;  ///< i32 [B + 1], contiguous
  /// i32 [B], contiguous: tokens per request on all ranks together, this step's included; not fewer
  /// than its query tokens, which are the last ones.
  ConstTensorView seq_lens;
  TensorView out;  ///< [T, Hq, L], dtype of q; last dimension stride 1; overlaps no input
  TensorView lse;  ///< f32 [T, Hq], natural log; undefined = not wanted
  /// As in MlaDecodeArgs, the same on all ranks: required by fp8 caches, undefined for others.
  ConstTensorView kv_scale;
  int interleave = 1;
  DcpCombine combine = DcpCombine::all_gather_reduce_scatter;
  /// scale (must be set), softcap and causal: a query then sees no later position. Windows, ALiBi
  /// and sinks are Unsupported, as in dcp_attention.
  AttentionParams params;
};

/// Absorbed decode over latents that are spread over the ranks:
///   1. all-gather the queries over heads: [T, N * Hq, E];
///   2. mla_decode of all heads over this rank's rows. Each query sees as many of them as lie at or
///      before its position, so that the mask is exact for several tokens of a request;
///   3. combine by LSE: the result for this rank's heads. A rank without a visible row has part 0.
/// kernels: the same on all ranks. With N = 1 the bits are those of mla_decode.
/// @throws InvalidArgument; Unsupported with every reason, also for a level or an arithmetic that
/// there is not (as mla_decode()); CommunicatorAborted.
void dcp_mla_decode(const DcpMlaDecodeArgs& args, Communicator& communicator,
                    Executor* executor = nullptr, const KernelOptions& kernels = {});

/// Arguments of dcp_gather_latents. B requests. All but src_cache is the same on all ranks.
struct DcpGatherLatentsArgs {
  /// [num_blocks, block_size, E] of any dtype (also rows of bytes): this rank's rows. block_size a
  /// multiple of `interleave`; last dimension stride 1.
  ConstTensorView src_cache;
  /// [>= cu_seq_lens[B], E], dtype of src_cache, any row stride; overlaps no input.
  TensorView dst;
  ConstTensorView block_table;  ///< i32 [B, max_blocks], as in DcpSlotMappingArgs
  /// i32 [B + 1], contiguous, ascending from 0: rows of request b are [cu[b], cu[b + 1]) of dst.
  ConstTensorView cu_seq_lens;
  /// i32 [B], contiguous, each >= 0: position of each request's first row; undefined = all 0.
  ConstTensorView seq_starts;
  int interleave = 1;
};

/// dst row cu[b] + i = the row at position seq_starts[b] + i of request b, whichever rank has it,
/// on every rank and bit for bit as it lies in the cache: what cp_gather_cache() gives where one
/// rank has all rows. So a prefill that goes on from here has the bits that it has without DCP.
/// Rows from cu[B] on are not touched.
///
/// Coded rows stay coded, as fewer bytes are sent. To read them, take dst as a cache of one block
/// [1, rows, E] for gather_and_maybe_dequant_cache().
/// @throws InvalidArgument; CommunicatorAborted.
void dcp_gather_latents(const DcpGatherLatentsArgs& args, Communicator& communicator,
                        Executor* executor = nullptr);

}  // namespace attend
