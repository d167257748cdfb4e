// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/sparse_index.h"

namespace attend::oracle {

// Walks through the tokens up to this one and counts those of the rank.
std::int64_t global_index(std::int64_t token, const PagedTokens& pages) noexcept {
  const auto capacity = static_cast<std::int64_t>(pages.blocks.size()) * pages.block_size;
  std::int64_t held = 0, owner = 0, in_run = 0;
  for (std::int64_t position = 0; position < token; ++position) {
    if (owner == pages.rank) ++held;
    if (held > capacity) return -1;
    if (++in_run < pages.interleave) continue;
    in_run = 0;
    owner = owner + 1 == pages.world_size ? 0 : owner + 1;
  }
  if (token < 0 || owner != pages.rank || held >= capacity) return -1;
  const std::int64_t block = pages.blocks[static_cast<std::size_t>(held / pages.block_size)];
  if (block < 0 || block >= pages.num_blocks) return -1;
  return block * pages.stride + held % pages.block_size;
}

}  // namespace attend::oracle
