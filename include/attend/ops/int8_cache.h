// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// Writing int8 KV caches. A code c stands for c * scale.
namespace attend {

/// Arguments of reshape_and_cache_flash_int8 and reshape_and_cache_flash_mix.
struct ReshapeAndCacheInt8Args {
  ConstTensorView key;      ///< i8 [T', Hkv, D], T' >= T; last dimension stride 1
  ConstTensorView value;    ///< [T', Hkv, Dv]; last dimension stride 1; dtype: see the functions
  ConstTensorView k_scale;  ///< f32 [T', Hkv], any strides: the scale of each key
  /// i8 [num_blocks, Hkv, block_size, D], any strides except the last (1).
  TensorView key_cache;
  TensorView value_cache;      ///< [num_blocks, Hkv, block_size, Dv], dtype of value
  TensorView key_scale_cache;  ///< f32 [num_blocks, Hkv, block_size], any strides
  /// i64 [T], contiguous: block * block_size + offset of each row; negative = skip that row.
  ConstTensorView slot_mapping;
};

/// Copies T new rows into a cache of int8 keys and int8 values, bit for bit, each key's scale
/// beside it. The scales of the values, [Hkv, D], do not depend on the token and are kept
/// elsewhere. If a slot occurs twice the later row wins.
/// @throws InvalidArgument (a slot >= num_blocks * block_size, shapes, dtypes), before any write.
void reshape_and_cache_flash_int8(const ReshapeAndCacheInt8Args& args,
                                  Executor* executor = nullptr);

/// Same with f16 or bf16 values (level 2: int8 queries and keys only).
void reshape_and_cache_flash_mix(const ReshapeAndCacheInt8Args& args, Executor* executor = nullptr);

/// Arguments of reshape_and_cache_int8_per_token_head.
struct ReshapeAndCachePerTokenHeadArgs {
  ConstTensorView key;    ///< [T', Hkv, D] f32, f16 or bf16, T' >= T; last dimension stride 1
  ConstTensorView value;  ///< [T', Hkv, Dv], dtype of key
  /// i8 [num_blocks, block_size, Hkv, D], any strides except the last (1).
  TensorView key_cache;
  TensorView value_cache;        ///< like key_cache, with Dv
  TensorView key_scale_cache;    ///< f32 [num_blocks, block_size, Hkv], any strides
  TensorView value_scale_cache;  ///< like key_scale_cache
  /// i64 [T], contiguous: block * block_size + offset of each row; negative = skip that row.
  ConstTensorView slot_mapping;
};

/// Quantises T new rows while it writes them: per (token, KV head) scale = max(amax / 127, 1e-6)
/// and codes = x / scale, divided in float32, rounded to the nearest integer (ties to even),
/// clamped to
/// [-128, 127] (-128 is never reached, because amax has the code 127). A row with an infinity or
/// NaN gets the scale NaN and codes 0. If a slot occurs twice the later row wins.
/// @throws InvalidArgument (a slot >= num_blocks * block_size, shapes, dtypes), before any write.
void reshape_and_cache_int8_per_token_head(const ReshapeAndCachePerTokenHeadArgs& args,
                                           Executor* executor = nullptr);

}  // namespace attend
