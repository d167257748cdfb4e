// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// The cache of the keys by which the indexer of sparse MLA chooses tokens: one key of 128 e4m3
/// codes a token, with one scale. Same semantics as vLLM's functions of these names.
///
/// A cache is u8 [num_blocks, block_size, 132]. Blocks may lie apart, but each is one piece of
/// memory (strides [any, 132, 1]), and the last two dimensions only count its bytes: first the
/// codes of all its tokens, 128 each, then their scales as f32, 4 bytes each.
/// An executor of null is default_executor(). Everything is checked before anything is written.
namespace attend {

/// Where things lie in a block, in bytes from its start.
namespace indexer_cache {
inline constexpr std::int64_t kDim = 128;       ///< elements of a key
inline constexpr std::int64_t kRowBytes = 132;  ///< codes and scale of a token
/// Codes of the token at `offset` in its block.
constexpr std::int64_t codes_at(std::int64_t offset) noexcept { return offset * kDim; }
/// Its scale, which need not be aligned.
constexpr std::int64_t scale_at(std::int64_t block_size, std::int64_t offset) noexcept {
  return block_size * kDim + offset * 4;
}
}  // namespace indexer_cache

/// What the scale of a key is.
enum class IndexerScale : std::uint8_t {
  unrounded,  ///< max(amax, 1e-4) / 448 in float32
  ue8m0       ///< the same, then rounded up to a power of two
};

/// Arguments of indexer_k_quant_and_cache.
struct IndexerKQuantAndCacheArgs {
  ConstTensorView k;    ///< [T', 128], T' >= T: f32, f16 or bf16; last dimension stride 1
  TensorView kv_cache;  ///< a cache as above
  /// i64 [T], contiguous: block * block_size + offset of each row; negative = skip that row.
  ConstTensorView slot_mapping;
  IndexerScale scale_fmt = IndexerScale::unrounded;
};

/// Writes T new keys: code = x / scale, divided in float32 and rounded to the nearest e4m3 number
/// (ties to even, at most +-448). amax is the largest finite magnitude of the key; infinities and
/// NaN give the NaN code with their sign and do not touch the other codes.
///
/// If a slot occurs twice the later row wins.
/// @throws InvalidArgument (a slot >= num_blocks * block_size, shapes, strides, dtypes, memory that
/// overlaps the cache), before any write.
void indexer_k_quant_and_cache(const IndexerKQuantAndCacheArgs& args, Executor* executor = nullptr);

/// Arguments of cp_gather_indexer_k_quant_cache.
struct CpGatherIndexerKQuantCacheArgs {
  ConstTensorView kv_cache;  ///< a cache as above
  /// fp8_e4m3 [N, 128], N >= cu_seq_lens[B], any row stride, last dimension stride 1.
  TensorView dst_k;
  TensorView dst_scale;  ///< f32 [N], contiguous
  /// i32 [B, max_blocks], last dimension stride 1: blocks of each request. Only the entries that
  /// are needed are read.
  ConstTensorView block_table;
  /// i32 [B + 1], contiguous, ascending from 0: rows of request b are [cu[b], cu[b + 1]).
  ConstTensorView cu_seq_lens;
};

/// Row cu[b] + i of dst_k and dst_scale = codes and scale of token i of request b, bit for bit.
/// Rows from cu[B] on are not touched.
/// @throws InvalidArgument (shapes, strides, dtypes, lengths that are not ascending or beyond the
/// results or the table, block ids outside of the cache, memory that overlaps a result), before any
/// write.
void cp_gather_indexer_k_quant_cache(const CpGatherIndexerKQuantCacheArgs& args,
                                     Executor* executor = nullptr);

}  // namespace attend
