// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attend/ops/cache.h"
#include "conformance/rng.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// Shape of a cache whose blocks move: any rank, the blocks in any dimension, any element type.
struct BlockCacheShape {
  explicit BlockCacheShape(Rng& rng);
  /// A cache of that shape, filled with random bits, with `num_blocks` blocks.
  Storage make(Rng& rng, std::int64_t num_blocks) const;
  std::string describe() const;

  DType dtype;
  std::vector<std::int64_t> dims;  ///< the entry of block_dim is a placeholder
  int block_dim;
  Layout layout;
};

/// Random moves between caches of `from` and `to` blocks.
std::vector<BlockMove> random_moves(Rng& rng, std::int64_t from, std::int64_t to);

/// Applies one move, element by element, to the expected state of `to`; `from` may be `to`.
void expect_move(Storage& to, const Storage& from, int block_dim, BlockMove move);

}  // namespace attend::conformance
