// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/ops/cache.h"

/// Writing, reading and moving the rows of multi-head latent attention (MLA): a row of the cache is
/// the latent (L elements) and then the rotated key (R elements), one for all heads. Same semantics
/// as vLLM's functions of these names; swap_blocks() of cache.h moves these caches too
/// (block_dim 0).
///
/// A cache is [num_blocks, block_size, L + R] of f32, f16, bf16, fp8_e4m3 or fp8_e5m2, or u8
/// [num_blocks, block_size, bytes of a row] in a format of row_format.h: fp8_ds_mla (656 bytes, L =
/// 512, R = 64) or fp8_ds_v4 (584 bytes, L = 448, R = 64; a block of it is one run of bytes,
/// strides [at least block_size * 584, 584, 1]). An executor of null is default_executor().
/// Everything is checked before anything is written.
namespace attend {

/// Arguments of concat_and_cache_mla.
struct ConcatAndCacheMlaArgs {
  ConstTensorView kv_c;  ///< [T', L], T' >= T: f32, f16 or bf16; last dimension stride 1
  ConstTensorView k_pe;  ///< [T', R], dtype of kv_c; last dimension stride 1
  /// As above, any strides except the last (1); dtype of kv_c, fp8_e4m3 or fp8_e5m2, or u8 rows for
  /// bf16 kv_c of the format's L.
  TensorView kv_cache;
  /// i64 [T], contiguous: block * block_size + offset of each row; negative = skip that row.
  ConstTensorView slot_mapping;
  /// f32 with 1 element (rank 0 or 1), finite and > 0: an fp8 code stands for code * scale.
  /// Required by fp8 caches; others do not read it (rows of bytes have scales of their own).
  ConstTensorView scale = {};
};

/// Writes T new rows into the cache. Into a cache of their dtype they are copied bit for bit. Into
/// an fp8 cache goes x / scale, divided in float32 and rounded to the nearest code (ties to even);
/// beyond the largest finite value, infinities too, it saturates; NaN gives the NaN code.
///
/// Into rows of bytes goes the latent in tiles with a scale each, by the format's RowScale. Codes
/// as above, except that infinities give the NaN code with their sign too, since a scale that they
/// do not share cannot hold them. k_pe is copied bit for bit, padding is 0.
///
/// If a slot occurs twice the later row wins.
/// @throws InvalidArgument (a slot >= num_blocks * block_size, shapes, sizes that the format does
/// not hold, dtypes, scale, memory that overlaps the cache), before any write.
void concat_and_cache_mla(const ConcatAndCacheMlaArgs& args, Executor* executor = nullptr);

/// Arguments of concat_and_cache_mla_rope_fused.
struct ConcatAndCacheMlaRopeFusedArgs {
  /// i64, contiguous, at least T entries: the position of each row, in [0, max_pos).
  ConstTensorView positions;
  /// [T', H, R], T' >= T: queries to rotate in place; dtype of kv_c, last dimension stride 1.
  TensorView q_pe;
  /// [T', R]: keys to rotate in place and to write; dtype of kv_c, last dimension stride 1.
  TensorView k_pe;
  ConstTensorView kv_c;  ///< as above
  /// [max_pos, R], R even, last dimension stride 1: cosines of the R / 2 pairs, then their sines;
  /// dtype of kv_c or f32.
  ConstTensorView cos_sin_cache;
  /// Pairs of elements: true = (i, i + R / 2) as GPT-NeoX, false = (2i, 2i + 1) as GPT-J.
  bool is_neox = false;
  ConstTensorView slot_mapping;  ///< as above; rows that are skipped are rotated nevertheless
  TensorView kv_cache;           ///< as above
  ConstTensorView scale = {};    ///< as above
};

/// Rotates the first T rows of q_pe and k_pe to their positions, in place, and writes kv_c and the
/// rotated k_pe into the cache: products and sum in float32, rounded once to the dtype, then
/// exactly what concat_and_cache_mla() does with the rotated rows.
/// @throws InvalidArgument as concat_and_cache_mla(), and for positions out of range, an odd R and
/// written tensors that overlap others, before any write.
void concat_and_cache_mla_rope_fused(const ConcatAndCacheMlaRopeFusedArgs& args,
                                     Executor* executor = nullptr);

/// Arguments of gather_and_maybe_dequant_cache.
struct GatherAndMaybeDequantCacheArgs {
  ConstTensorView src_cache;  ///< a cache as above, any strides except the last (1)
  /// [N, L + R], N >= cu_seq_lens[B]: f32, f16 or bf16, any row stride, last dimension stride 1. A
  /// cache that is neither fp8 nor of bytes must have this dtype.
  TensorView dst;
  /// i32 [B, max_blocks], last dimension stride 1: blocks of each request. Only the entries that
  /// are needed are read.
  ConstTensorView block_table;
  /// i32 [B + 1], contiguous, ascending from 0: rows of request b are [cu[b], cu[b + 1]) of dst.
  ConstTensorView cu_seq_lens;
  /// i32 [B], contiguous, each >= 0: first token of each request, anywhere in a block; undefined =
  /// all 0.
  ConstTensorView seq_starts = {};
  /// As in ConcatAndCacheMlaArgs: required by fp8 caches, not read by others.
  ConstTensorView scale = {};
};

/// dst row cu[b] + i = token seq_starts[b] + i of request b. Rows of dst's dtype are copied bit for
/// bit. An fp8 element becomes code * scale, multiplied in float32, then rounded once to dst's
/// dtype. An element of a row of bytes becomes the bf16 number that row_format.h defines, then
/// dst's dtype. A NaN that a code or scale makes is the positive quiet one without payload.
/// Rows from cu[B] on are not touched.
/// @throws InvalidArgument (shapes, dtypes, scale, lengths that are not ascending or beyond dst or
/// the table, block ids outside of the cache, memory that overlaps dst), before any write.
void gather_and_maybe_dequant_cache(const GatherAndMaybeDequantCacheArgs& args,
                                    Executor* executor = nullptr);

/// Arguments of cp_gather_cache.
struct CpGatherCacheArgs {
  /// [num_blocks, block_size, E] of any dtype, last dimension stride 1. Not fp8_ds_v4, whose rows
  /// are no runs of bytes.
  ConstTensorView src_cache;
  TensorView dst;               ///< [N, E], N >= cu_seq_lens[B], dtype of src_cache, any row stride
  ConstTensorView block_table;  ///< as above
  ConstTensorView cu_seq_lens;  ///< as above
  ConstTensorView seq_starts = {};  ///< as above
};

/// Copies the rows as they are, bit for bit, in whatever format: otherwise as
/// gather_and_maybe_dequant_cache().
void cp_gather_cache(const CpGatherCacheArgs& args, Executor* executor = nullptr);

/// Arguments of cp_gather_and_upconvert_fp8_kv_cache.
struct CpGatherAndUpconvertFp8KvCacheArgs {
  ConstTensorView src_cache;    ///< a cache of bytes as above
  TensorView dst;               ///< bf16 [N, L + R], any row stride, last dimension stride 1
  ConstTensorView block_table;  ///< as above
  /// i32 [B], contiguous, ascending, each in [0, N]: the rows of request b, from its token 0 on,
  /// are [starts[b], starts[b + 1]) of dst; those of the last request end at N.
  ConstTensorView workspace_starts;
};

/// Reads rows of bytes as gather_and_maybe_dequant_cache() does. Rows before
/// workspace_starts[0] are not touched. @throws InvalidArgument likewise.
void cp_gather_and_upconvert_fp8_kv_cache(const CpGatherAndUpconvertFp8KvCacheArgs& args,
                                          Executor* executor = nullptr);

/// copy_blocks() for caches of rank 3 as above, one a layer, whose blocks are dimension 0.
/// @throws InvalidArgument likewise, and for another rank.
void copy_blocks_mla(std::span<const TensorView> caches, std::span<const BlockMove> moves);

}  // namespace attend
