// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// Writing and moving KV-cache blocks. Same semantics as vLLM's functions of these names.
namespace attend {

/// Arguments of reshape_and_cache_flash.
struct ReshapeAndCacheFlashArgs {
  ConstTensorView key;    ///< [T', Hkv, D], T' >= T; last dimension stride 1
  ConstTensorView value;  ///< [T', Hkv, Dv], dtype of key
  /// [num_blocks, block_size, Hkv, D], any strides except the last (1): NHD and HND views both
  /// work. dtype of key, fp8_e4m3 or fp8_e5m2.
  TensorView key_cache;
  TensorView value_cache;  ///< like key_cache, with Dv; dtype of key_cache
  /// i64 [T], contiguous: block * block_size + offset of each row; negative = skip that row.
  ConstTensorView slot_mapping;
  /// f32 with 1 element (per tensor; rank 0 or 1) or [Hkv], contiguous; each finite and > 0: an fp8
  /// code stands for code * scale. Required by fp8 caches; others do not read it.
  ConstTensorView k_scale = {};
  ConstTensorView v_scale = {};  ///< like k_scale, and of its size
};

/// Writes T new rows (f32, f16, bf16) into the cache. Into a cache of their dtype they are copied
/// bit for bit. Into an fp8 cache goes x / scale, divided in float32 and rounded to the nearest
/// code (ties to even); beyond the largest finite value, infinities too, it saturates; NaN gives
/// the NaN code. If a slot occurs twice the later row wins.
/// @throws InvalidArgument (a slot >= num_blocks * block_size, shapes, dtypes, scales), before any
/// write.
void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& args, Executor* executor = nullptr);

/// One block move: `from` and `to` are block indices.
struct BlockMove {
  std::int64_t from = 0, to = 0;
};

/// Copies blocks between two caches of equal block shape and dtype (e.g. a device cache and its
/// swap space). `block_dim` is the dimension that counts blocks. Moves apply in order.
/// @throws InvalidArgument (index out of range, shapes differ, same memory), before any write.
void swap_blocks(const ConstTensorView& src, const TensorView& dst, int block_dim,
                 std::span<const BlockMove> moves);

/// Copies blocks inside each cache (copy-on-write of beam search), the same moves for every cache.
/// `block_dim` as above. Moves apply in order. An empty list of caches or moves is no error.
/// @throws InvalidArgument (index out of range, caches that share memory), before any write.
void copy_blocks(std::span<const TensorView> caches, int block_dim,
                 std::span<const BlockMove> moves);

}  // namespace attend
