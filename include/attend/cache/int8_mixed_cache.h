// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/cache/kv_cache_spec.h"
#include "attend/core/tensor_view.h"

/// The cache of level 2 (int8 queries and keys, 16-bit values): one int8 tensor
/// [3, num_blocks, num_kv_heads, block_size, head_size]. Plane 0 has the keys. Planes 1 and 2
/// together, read as 16-bit numbers, are the values [num_blocks, num_kv_heads, block_size,
/// head_size].
///
/// So the values of block b are not at index b of planes 1 and 2: they fill bytes [2b, 2b + 2) * S
/// behind plane 0, where S is the bytes of a block of keys. Moving index b of dimension 1 of the
/// whole tensor would destroy the values of other blocks. Move blocks through both views, where
/// they are dimension 0: `copy_blocks({keys, values}, 0, moves)`.
namespace attend {

/// [3, num_blocks, num_kv_heads, block_size, head_size]. The spec's dtype must be i8 and it has no
/// layers dimension. @throws InvalidArgument also where spec.validate() does.
std::vector<std::int64_t> int8_mixed_cache_shape(const KvCacheSpec& spec);

/// Keys of such a tensor: i8 [num_blocks, num_kv_heads, block_size, head_size].
/// @throws InvalidArgument unless `cache` is contiguous, i8, of rank 5 with 3 planes.
TensorView int8_mixed_key_view(const TensorView& cache);

/// Values of such a tensor: `dtype` (f16 or bf16) [num_blocks, num_kv_heads, block_size,
/// head_size].
/// @throws InvalidArgument as above, for another dtype, or if plane 1 begins at an odd address.
TensorView int8_mixed_value_view(const TensorView& cache, DType dtype);

}  // namespace attend
