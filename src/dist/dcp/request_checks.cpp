// SPDX-License-Identifier: Apache-2.0
#include "dist/dcp/request_checks.h"

#include "core/check.h"
#include "dist/dcp/layout.h"

namespace attend::dcp {

void check_starts(std::string_view op, std::span<const std::int32_t> starts, std::int64_t tokens) {
  const check::Where where{op, "query_start_loc"};
  check::require(!starts.empty() && starts[0] == 0, where, "0 at index 0", [&] {
    return starts.empty() ? std::string("no entry") : check::text_of(starts[0]);
  });
  for (std::size_t r = 0; r + 1 < starts.size(); ++r) {
    check::require(
        starts[r + 1] >= starts[r], where,
        [&] { return fmt::format("at least {} at index {}", starts[r], r + 1); }, starts[r + 1]);
  }
  check::require(
      starts.back() == tokens, where,
      [&] { return fmt::format("{} at the end, the number of tokens", tokens); }, starts.back());
}

void check_blocks(std::string_view op, std::string_view cache_name, const RankBlocks& blocks,
                  std::int64_t requests) {
  check_layout(op, blocks.layout);
  check::require(blocks.block_size() > 0 && blocks.block_size() <= (1 << 30), {op, cache_name},
                 "blocks of at least one token and at most 2^30",
                 [&] { return describe(blocks.cache); });
  check::require(
      blocks.block_size() % blocks.layout.interleave == 0, {op, "interleave"},
      [&] { return fmt::format("a divisor of the block size, {}", blocks.block_size()); },
      blocks.layout.interleave);
  check::tensor({op, "block_table"}, blocks.table, 2, {DType::i32});
  check::shape({op, "block_table"}, blocks.table, {requests, -1});
  check::unit_last_stride({op, "block_table"}, blocks.table);
}

void check_positions(std::string_view op, const RankBlocks& blocks, const Positions& p) {
  if (p.begin >= p.end) return;
  const check::Where where{op, "block_table"};
  // Divided, not multiplied: the width is not trusted.
  const std::int64_t covered = blocks.block_size() * blocks.layout.world_size;
  const std::int64_t columns = (p.end - 1) / covered + 1;
  check::require(
      columns <= blocks.table.shape[1], where,
      [&] {
        return fmt::format("at least {} columns of {} tokens for request {}", columns, covered,
                           p.request);
      },
      blocks.table.shape[1]);
  const std::int64_t first = local_count(p.begin, blocks.rank, blocks.layout);
  const std::int64_t end = local_count(p.end, blocks.rank, blocks.layout);
  if (first == end) return;
  const std::int32_t* row = blocks.table.as<std::int32_t>() + p.request * blocks.table.strides[0];
  for (std::int64_t b = first / blocks.block_size(); b <= (end - 1) / blocks.block_size(); ++b) {
    if (row[b] >= 0 && row[b] < blocks.cache.shape[0]) continue;
    check::fail(
        where,
        [&] {
          return fmt::format("block ids in [0, {}) at [{}, {}]", blocks.cache.shape[0], p.request,
                             b);
        },
        row[b]);
  }
}

}  // namespace attend::dcp
