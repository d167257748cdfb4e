// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

#include "attend/core/tensor_view.h"
#include "attend/dist/decode_context_parallel.h"

/// Checks of lengths and block tables that the functions for several ranks share. All throw
/// InvalidArgument.
namespace attend::dcp {

/// query_start_loc: 0, no decrease, `tokens` at the end.
void check_starts(std::string_view op, std::span<const std::int32_t> starts, std::int64_t tokens);

/// A rank's cache of latents, [num_blocks, block_size, *], and the table to it.
struct RankBlocks {
  ConstTensorView cache, table;
  DcpLayout layout;
  int rank = 0;

  std::int64_t block_size() const noexcept { return cache.shape[1]; }
};

/// Positions [begin, end) of a request.
struct Positions {
  std::int64_t request = 0, begin = 0, end = 0;
};

/// Layout and rank, blocks that the interleave divides, and a table with a row for each request.
/// @pre check::tensor passed for the cache.
void check_blocks(std::string_view op, std::string_view cache_name, const RankBlocks& blocks,
                  std::int64_t requests);

/// The table's row is wide enough for the positions, which every rank finds alike, and this rank's
/// blocks among them are blocks of the cache. @pre check_blocks passed.
void check_positions(std::string_view op, const RankBlocks& blocks, const Positions& positions);

}  // namespace attend::dcp
