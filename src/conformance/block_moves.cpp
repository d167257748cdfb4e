// SPDX-License-Identifier: Apache-2.0
#include "conformance/block_moves.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <numeric>
#include <utility>

namespace attend::conformance {

BlockCacheShape::BlockCacheShape(Rng& rng)
    : dtype(rng.pick({DType::f32, DType::f16, DType::bf16})), block_dim(0) {
  const int rank = rng.range(2, 6);
  for (int i = 0; i < rank; ++i) dims.push_back(rng.range(1, 5));
  dims.back() = 8 * rng.range(1, 4);
  block_dim = rng.range(0, rank - 2);
  layout.padded = rng.chance(0.5);
  layout.order.resize(dims.size());
  std::iota(layout.order.begin(), layout.order.end(), 0);
  if (rng.chance(0.5)) {
    std::swap(layout.order[0], layout.order[static_cast<std::size_t>(rng.range(0, rank - 2))]);
  }
}

Storage BlockCacheShape::make(Rng& rng, std::int64_t num_blocks) const {
  std::vector<std::int64_t> shape = dims;
  shape[static_cast<std::size_t>(block_dim)] = num_blocks;
  Storage cache(rng, dtype, shape, layout);
  cache.set_random(rng, 1.0);
  return cache;
}

std::string BlockCacheShape::describe() const {
  return fmt::format("{} shape [{}] block_dim {} order [{}]", to_string(dtype),
                     fmt::join(dims, ","), block_dim, fmt::join(layout.order, ","));
}

std::vector<BlockMove> random_moves(Rng& rng, std::int64_t from, std::int64_t to) {
  std::vector<BlockMove> moves;
  const int n = rng.range(0, 8);
  for (int i = 0; i < n; ++i) {
    moves.push_back({rng.range(std::int64_t{0}, from - 1), rng.range(std::int64_t{0}, to - 1)});
  }
  return moves;
}

void expect_move(Storage& to, const Storage& from, int block_dim, BlockMove move) {
  const auto dim = static_cast<std::size_t>(block_dim);
  const TensorView target = to.view(), source = from.view();
  const std::vector<std::int64_t> to_offsets = to.offsets(), from_offsets = from.offsets();
  std::int64_t inner = 1;
  for (int i = block_dim + 1; i < target.rank; ++i)
    inner *= target.shape[static_cast<std::size_t>(i)];
  const std::int64_t outer = target.numel() / (inner * target.shape[dim]);
  for (std::int64_t o = 0; o < outer; ++o) {
    for (std::int64_t i = 0; i < inner; ++i) {
      const auto t = static_cast<std::size_t>((o * target.shape[dim] + move.to) * inner + i);
      const auto f = static_cast<std::size_t>((o * source.shape[dim] + move.from) * inner + i);
      if (&to == &from) {
        to.expect_copy_within(to_offsets[t], to_offsets[f]);
      } else {
        to.expect_copy(to_offsets[t], from, from_offsets[f]);
      }
    }
  }
}

}  // namespace attend::conformance
