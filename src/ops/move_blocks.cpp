// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/cache.h"
#include "attend/ops/mla_cache.h"
#include "core/check.h"
#include "ops/strided_copy.h"

namespace attend {
namespace {

void require_block_dim(std::string_view op, int block_dim, const ConstTensorView& cache) {
  check::require(
      block_dim >= 0 && block_dim < cache.rank, {op, "block_dim"},
      [&] { return fmt::format("a dimension of {}", describe(cache)); }, block_dim);
}

void require_moves(std::string_view op, std::span<const BlockMove> moves, std::int64_t from_blocks,
                   std::int64_t to_blocks) {
  const auto in_range = [&](std::string_view end, std::int64_t block, std::int64_t blocks,
                            std::size_t i) {
    check::require(
        block >= 0 && block < blocks, {op, "moves"},
        [&] { return fmt::format("'{}' blocks from 0 to {}", end, blocks - 1); },
        [&] { return fmt::format("{} at index {}", block, i); });
  };
  for (std::size_t i = 0; i < moves.size(); ++i) {
    in_range("from", moves[i].from, from_blocks, i);
    in_range("to", moves[i].to, to_blocks, i);
  }
}

void require_cache(check::Where where, const ConstTensorView& cache) {
  check::require(
      cache.rank >= 1 && cache.rank <= kMaxRank, where,
      [] { return fmt::format("rank 1 to {}", kMaxRank); },
      [&] { return fmt::format("rank {}", cache.rank); });
  check::tensor(where, cache, cache.rank, {});
}

template <typename View>
auto* block_address(const View& cache, int block_dim, std::int64_t block) noexcept {
  return cache.select(block_dim, block).template as<std::byte>();
}

void move(const TensorView& dst, const ConstTensorView& src, int block_dim,
          std::span<const BlockMove> moves) noexcept {
  if (moves.empty() || dst.numel() == 0) return;
  const StridedCopy copy(dst.select(block_dim, 0), src.select(block_dim, 0));
  for (const BlockMove& m : moves) {
    if (src.data == dst.data && m.from == m.to) continue;
    copy.run(block_address(dst, block_dim, m.to), block_address(src, block_dim, m.from));
  }
}

void copy_blocks_of(std::string_view op, std::span<const TensorView> caches, int block_dim,
                    std::span<const BlockMove> moves) {
  const check::Where where{op, "caches"};
  for (std::size_t i = 0; i < caches.size(); ++i) {
    require_cache(where, caches[i]);
    require_block_dim(op, block_dim, caches[i]);
    check::distinct_elements(where, caches[i]);
    for (std::size_t k = 0; k < i; ++k) {
      // Moves that depend on each other would be applied twice to shared memory.
      check::require(!check::overlaps(caches[i], caches[k]), where, "caches apart from each other",
                     [&] { return fmt::format("shared memory at indices {} and {}", k, i); });
    }
    const std::int64_t blocks = caches[i].shape[block_dim];
    require_moves(op, moves, blocks, blocks);
  }
  for (const TensorView& cache : caches) move(cache, cache, block_dim, moves);
}

}  // namespace

void swap_blocks(const ConstTensorView& src, const TensorView& dst, int block_dim,
                 std::span<const BlockMove> moves) {
  constexpr std::string_view kOp = "swap_blocks";
  require_cache({kOp, "src"}, src);
  require_cache({kOp, "dst"}, dst);
  require_block_dim(kOp, block_dim, src);
  const auto same_blocks = [&] {
    if (src.rank != dst.rank || src.dtype != dst.dtype) return false;
    for (int i = 0; i < src.rank; ++i) {
      if (i != block_dim && src.shape[i] != dst.shape[i]) return false;
    }
    return true;
  };
  check::require(
      same_blocks(), {kOp, "dst"},
      [&] { return fmt::format("blocks (along dimension {}) like {}", block_dim, describe(src)); },
      [&] { return describe(dst); });
  check::distinct_elements({kOp, "dst"}, dst);
  check::no_overlap({kOp, "dst"}, dst, "src", src);
  require_moves(kOp, moves, src.shape[block_dim], dst.shape[block_dim]);
  move(dst, src, block_dim, moves);
}

void copy_blocks(std::span<const TensorView> caches, int block_dim,
                 std::span<const BlockMove> moves) {
  copy_blocks_of("copy_blocks", caches, block_dim, moves);
}

void copy_blocks_mla(std::span<const TensorView> caches, std::span<const BlockMove> moves) {
  constexpr std::string_view kOp = "copy_blocks_mla";
  for (const TensorView& cache : caches) check::tensor({kOp, "caches"}, cache, 3, {});
  copy_blocks_of(kOp, caches, 0, moves);
}

}  // namespace attend
