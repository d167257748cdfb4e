// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/ops/differential.h"

/// Writing the cache of differential attention (attend/cache/differential.h).
namespace attend {

/// Arguments of differential_reshape_and_cache.
struct DifferentialReshapeAndCacheArgs {
  ConstTensorView key;    ///< [T', Hk, D], T' >= T, Hk even; f32, f16 or bf16; last stride 1
  ConstTensorView value;  ///< like key
  /// [2, 2, num_blocks, block_size, Hk / 2, D], any strides except the last (1); dtype of key,
  /// fp8_e4m3 or fp8_e5m2. Overlaps no input.
  TensorView kv_cache;
  ConstTensorView slot_mapping;  ///< i64 [T], contiguous; negative = skip that row
  HeadPairing pairing = HeadPairing::interleaved;
  /// As in ReshapeAndCacheFlashArgs; [Hk] in the order of the heads of key.
  ConstTensorView k_scale, v_scale;
};

/// Writes T rows: the first head of each pair into branch 0, the second into branch 1, encoded as
/// reshape_and_cache_flash() does.
/// @throws InvalidArgument, before any write.
void differential_reshape_and_cache(const DifferentialReshapeAndCacheArgs& args,
                                    Executor* executor = nullptr);

}  // namespace attend
