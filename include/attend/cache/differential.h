// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/cache/kv_cache_spec.h"

/// The cache of differential attention: two branches, one for each of a pair's two heads.
namespace attend {

/// [2 branches, 2 (K, V), num_blocks, block_size, num_kv_heads / 2, head_size], with num_layers in
/// front if the spec has it. spec.num_kv_heads counts the heads of both branches: the cache has the
/// bytes of an ordinary one. @throws InvalidArgument: an odd number of kv heads, a block size that
/// is no multiple of 16 (the rules of seed 004), a format other than plain, and where
/// spec.validate() does.
std::vector<std::int64_t> differential_cache_shape(const KvCacheSpec& spec);

/// Permutation as flash_attn_stride_order(): physical dimension i is logical dimension order[i].
/// NHD is the logical order, HND has heads before the tokens of a block. With layers the blocks are
/// outermost (then the heads, if HND), so that one block of all layers moves as one.
std::vector<int> differential_stride_order(KvLayout layout, bool include_layers);

/// Dimension of the shape without layers that counts blocks. swap_blocks() and copy_blocks() with
/// it move both branches.
inline constexpr int kDifferentialBlockDim = 2;

}  // namespace attend
