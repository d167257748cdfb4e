// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "conformance/rng.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// A random order of 0 .. n - 1.
std::vector<std::int32_t> shuffled(Rng& rng, std::int64_t n);

/// Blocks of several requests, scattered over a cache with spare blocks.
struct RandomBlocks {
  /// `tokens[r]` slots for request r, of which the first `unused[r]` are never touched.
  RandomBlocks(Rng& rng, std::span<const std::int32_t> tokens, std::span<const std::int32_t> unused,
               int tokens_per_block, bool padded);

  std::int64_t block(int request, std::int64_t token) const {
    return table.view().as<std::int32_t>()[table.offset({request, token / block_size})];
  }

  int block_size;
  std::int64_t num_blocks;
  Storage table;  ///< i32 [B, max_blocks]; entries of untouched blocks are out of range
};

}  // namespace attend::conformance
