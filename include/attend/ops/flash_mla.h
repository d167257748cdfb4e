// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/ops/kernel_options.h"

/// Latent attention with the arguments, layouts and conventions of FlashMLA, and its schedule.
/// mla_decode() and sparse_mla_attention() do the same in the conventions of this library.
namespace attend {

/// Arguments of get_mla_metadata. B requests.
struct GetMlaMetadataArgs {
  ConstTensorView cache_seqlens;  ///< i32 [B], contiguous, B >= 1, each >= 0: keys of a request
  /// i32 [parts, 8], contiguous, parts >= 1, see mla_num_sm_parts(). A row: first request, its
  /// first block, last request (inclusive), its last block (exclusive), number of the split that
  /// the part begins with, three zeros. Blocks are of 64 keys.
  TensorView tile_scheduler_metadata;
  TensorView num_splits;  ///< i32 [B + 1], contiguous: prefix sum of the splits of each request
};

/// Rows of tile_scheduler_metadata for so many processors: FlashMLA's number for SM90, half of them
/// over the tiles of 128 query rows, at least 1.
/// @pre All >= 1, num_heads_k divides num_heads_q.
int mla_num_sm_parts(int num_processors, int num_heads_q, int num_heads_k,
                     int num_q_tokens) noexcept;

/// Cuts the blocks of all requests into parts of equal cost, a request costing 5 blocks more than
/// it has. Definition: FlashMLA's get_mla_metadata as of its SM90 kernels for one key head.
/// @throws InvalidArgument, before anything is written.
void get_mla_metadata(const GetMlaMetadataArgs& args);

/// Arguments of flash_mla_with_kvcache. Sq query tokens of each of B requests.
struct FlashMlaWithKvCacheArgs {
  ConstTensorView q;  ///< [B, Sq, H, D], B >= 1; last dimension stride 1
  /// [num_blocks, 64, 1, D] of q's dtype (f32, f16, bf16); with is_fp8_kvcache u8 [num_blocks, 64,
  /// 1, bytes], rows of a format of row_format.h, and q is bf16 with as many elements as they have:
  /// 576 for 656 bytes, 512 for 584. Last dimension stride 1.
  ConstTensorView k_cache;
  /// i32 [B, max_blocks], stride 1 in the last dimension. Not read with indices.
  ConstTensorView block_table;
  /// i32 [B], contiguous: keys, those of the Sq tokens included. Not read with indices.
  ConstTensorView cache_seqlens;
  int head_dim_v = 512;  ///< the first elements of a key that are its value
  /// As get_mla_metadata() wrote them for cache_seqlens (with indices: for topk keys of every
  /// request); those of other lengths are refused. Both or neither. The kernels have a schedule of
  /// their own: these do not change any bit.
  ConstTensorView tile_scheduler_metadata, num_splits;
  /// Unset = 1 / sqrt(D). A model's scale is that of its heads before absorption.
  std::optional<float> softmax_scale;
  /// Bottom-right: token i sees keys up to cache_seqlens - Sq + i. Not with indices.
  bool causal = false;
  bool is_fp8_kvcache = false;
  /// i32 [B, Sq, topk], topk >= 1, last dimension stride 1: slots (block * 64 + offset in the
  /// block) of each token's keys, as in SparseMlaArgs. Undefined = dense, then the rest is
  /// undefined, too.
  ConstTensorView indices;
  /// i32 [B]: indices that count of each token of a request, as in SparseMlaArgs; undefined = topk.
  ConstTensorView topk_length;
  ConstTensorView attn_sink;  ///< f32 [H]: as in FlashMlaSparseFwdArgs; undefined = none
  /// [num_blocks, block_size, 1, D or bytes], type and format of k_cache, any block size: more
  /// keys, which come after the others. Undefined = none.
  ConstTensorView extra_k_cache;
  ConstTensorView extra_indices;      ///< as indices; given if and only if extra_k_cache is
  ConstTensorView extra_topk_length;  ///< as topk_length
  TensorView out;  ///< [B, Sq, H, head_dim_v], dtype of q; last dimension stride 1
  TensorView lse;  ///< f32 [B, H, Sq], natural log; +infinity for a row without keys (its out is 0)
};

/// Attends. @throws InvalidArgument; Unsupported for a level or an arithmetic that there is not.
/// Both before anything is written.
void flash_mla_with_kvcache(const FlashMlaWithKvCacheArgs& args, Executor* executor = nullptr,
                            const KernelOptions& kernels = {});

/// Arguments of flash_mla_sparse_fwd. T query tokens, H heads, no batch: indices are those of rows
/// of all requests.
struct FlashMlaSparseFwdArgs {
  ConstTensorView q;   ///< [T, H, D], f32, f16 or bf16; last dimension stride 1
  ConstTensorView kv;  ///< [S, 1, D], dtype of q; last dimension stride 1
  /// i32 [T, 1, topk], topk >= 1, last dimension stride 1: rows of kv. Less than 0 or at least S
  /// names nothing; what is named twice counts twice.
  ConstTensorView indices;
  float sm_scale = 0.0F;  ///< multiplies the products; finite, > 0: must be set
  int d_v = 512;          ///< the first elements of a row that are its value
  /// f32 [H]: as sinks of AttentionParams, not counted in lse; +infinity makes the head's output 0,
  /// NaN is refused. Undefined = none.
  ConstTensorView attn_sink;
  ConstTensorView topk_length;  ///< i32 [T]: as in SparseMlaArgs; undefined = topk
  TensorView out;         ///< [T, H, d_v], dtype of q; last dimension stride 1; overlaps no input
  TensorView max_logits;  ///< f32 [T, H]: largest scaled logit; -infinity for a row without keys
  TensorView lse;  ///< f32 [T, H], natural log; +infinity for a row without keys (its out is 0)
};

/// Attends to the named rows, with the bits of sparse_mla_attention(). @throws InvalidArgument;
/// Unsupported for a level or an arithmetic that there is not. Both before anything is written.
void flash_mla_sparse_fwd(const FlashMlaSparseFwdArgs& args, Executor* executor = nullptr,
                          const KernelOptions& kernels = {});

}  // namespace attend
