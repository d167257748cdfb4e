// SPDX-License-Identifier: Apache-2.0
#include "conformance/random_blocks.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace attend::conformance {

std::vector<std::int32_t> shuffled(Rng& rng, std::int64_t n) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  std::iota(ids.begin(), ids.end(), 0);
  for (std::size_t i = ids.size(); i > 1; --i) {
    std::swap(ids[i - 1], ids[static_cast<std::size_t>(rng.next() % i)]);
  }
  return ids;
}

RandomBlocks::RandomBlocks(Rng& rng, std::span<const std::int32_t> tokens,
                           std::span<const std::int32_t> unused, int tokens_per_block, bool padded)
    : block_size(tokens_per_block), num_blocks(rng.range(1, 5)) {
  const auto blocks_for = [&](std::int64_t n) { return (n + block_size - 1) / block_size; };
  std::int64_t widest = 0;
  for (const std::int32_t n : tokens) {
    num_blocks += blocks_for(n);
    widest = std::max(widest, blocks_for(n));
  }
  const auto requests = static_cast<std::int64_t>(tokens.size());
  const std::int64_t width = widest + rng.range(1, 3);
  Layout layout;
  layout.padded = padded;
  table = Storage(rng, DType::i32, {requests, width}, layout);
  auto* entries = table.view().as<std::int32_t>();
  const std::vector<std::int32_t> ids = shuffled(rng, num_blocks);
  std::size_t next = 0;
  for (std::int64_t r = 0; r < requests; ++r) {
    const std::int64_t end = blocks_for(tokens[static_cast<std::size_t>(r)]);
    const std::int64_t begin = unused[static_cast<std::size_t>(r)] / block_size;
    for (std::int64_t b = 0; b < width; ++b) {
      entries[table.offset({r, b})] =
          b >= begin && b < end
              ? ids[next++]
              : rng.pick({std::numeric_limits<std::int32_t>::max(), -1, -1000000});
    }
  }
}

}  // namespace attend::conformance
