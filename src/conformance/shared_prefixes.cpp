// SPDX-License-Identifier: Apache-2.0
#include "conformance/shared_prefixes.h"

#include <algorithm>

namespace attend::conformance {
namespace {

/// Most blocks that all requests of [begin, end) have keys for.
int most_blocks(const AttentionShape& shape, int begin, int end, int block_size) {
  return *std::min_element(shape.seq_lens.begin() + begin, shape.seq_lens.begin() + end) /
         block_size;
}

}  // namespace

AttentionShape random_shared_shape(Rng& rng) {
  AttentionShape s = random_shape(rng);
  s.group_size = rng.pick({1, 2, 3, 4, 8, 12});
  s.kv_heads = rng.range(1, s.group_size > 4 ? 1 : 2);
  s.query_lens.clear();
  s.seq_lens.clear();
  const int common = 256 * rng.range(0, 2) + rng.range(0, 255);
  const int requests = rng.range(2, 6);
  for (int r = 0; r < requests; ++r) {
    s.query_lens.push_back(rng.chance(0.7) ? 1 : rng.range(0, 5));
    s.seq_lens.push_back(common + (rng.chance(0.8) ? rng.range(0, 200) : rng.range(200, 900)));
  }
  return s;
}

std::vector<SharedPrefix> random_shared_prefixes(Rng& rng, const AttentionShape& shape,
                                                 int block_size) {
  std::vector<SharedPrefix> prefixes;
  const auto add = [&](int begin, int end, int least) {
    const int most = most_blocks(shape, begin, end, block_size);
    if (most < least) return 0;
    const int blocks = rng.chance(0.6) ? most : rng.range(least, most);
    prefixes.push_back({begin, end, blocks * block_size});
    return blocks;
  };
  for (int begin = 0; begin < shape.num_reqs();) {
    const int end = rng.chance(0.5) ? shape.num_reqs() : rng.range(begin + 1, shape.num_reqs());
    const int blocks = rng.chance(0.9) ? add(begin, end, 1) : 0;
    if (blocks > 0 && rng.chance(0.5)) {
      const int inner = rng.range(begin, end - 1);
      add(inner, rng.range(inner + 1, end), blocks + 1);
    }
    begin = end;
  }
  return prefixes;
}

std::vector<std::int32_t> hidden_keys(const AttentionShape& shape,
                                      std::span<const SharedPrefix> prefixes) {
  const std::vector<std::int32_t> own = shape.hidden_keys();
  std::vector<std::int32_t> hidden = own;
  for (const SharedPrefix& p : prefixes) {
    hidden[static_cast<std::size_t>(p.request_begin)] =
        std::min(hidden[static_cast<std::size_t>(p.request_begin)],
                 *std::min_element(own.begin() + p.request_begin, own.begin() + p.request_end));
  }
  return hidden;
}

void share_blocks(RandomBlocks& blocks, const AttentionShape& shape,
                  std::span<const SharedPrefix> prefixes) {
  const std::vector<std::int32_t> hidden = hidden_keys(shape, prefixes);
  auto* entries = blocks.table.view().as<std::int32_t>();
  for (const SharedPrefix& p : prefixes) {
    for (std::int64_t r = p.request_begin + 1; r < p.request_end; ++r) {
      for (std::int64_t b = hidden[static_cast<std::size_t>(r)] / blocks.block_size;
           b < p.num_keys / blocks.block_size; ++b) {
        entries[blocks.table.offset({r, b})] = entries[blocks.table.offset({p.request_begin, b})];
      }
    }
  }
}

}  // namespace attend::conformance
