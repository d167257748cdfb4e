// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

/// Reference of the conversion of chosen tokens to rows of a cache.
namespace attend::oracle {

/// A request in a cache of pages, of which a rank of a group may hold only a part.
struct PagedTokens {
  std::span<const std::int32_t> blocks;  ///< [max_blocks]
  std::int64_t num_blocks = 0;           ///< of the cache
  std::int64_t block_size = 1;           ///< >= 1
  std::int64_t stride = 1;               ///< rows from block to block, >= block_size
  std::int64_t world_size = 1;           ///< >= 1
  std::int64_t interleave = 1;           ///< consecutive tokens on one rank; >= 1
  std::int64_t rank = 0;                 ///< whose cache it is
};

/// Row of a token; -1 if the rank does not hold it or the cache has no such row.
std::int64_t global_index(std::int64_t token, const PagedTokens& pages) noexcept;

}  // namespace attend::oracle
