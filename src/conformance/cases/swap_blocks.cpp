// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/cache.h"
#include "conformance/block_moves.h"
#include "conformance/check.h"

namespace attend::conformance {
namespace {

class SwapBlocksCase final : public Case {
 public:
  explicit SwapBlocksCase(Rng& rng)
      : shape_(rng),
        src_blocks_(rng.range(std::int64_t{1}, std::int64_t{9})),
        dst_blocks_(rng.range(std::int64_t{1}, std::int64_t{9})),
        src_(shape_.make(rng, src_blocks_)),
        dst_(shape_.make(rng, dst_blocks_)),
        moves_(random_moves(rng, src_blocks_, dst_blocks_)) {
    src_.freeze();
    dst_.freeze();
  }

  Outcome run(const KernelOptions&, Executor&) override {
    src_.reset();
    dst_.reset();
    for (const BlockMove& move : moves_) expect_move(dst_, src_, shape_.block_dim, move);
    swap_blocks(src_.view(), dst_.view(), shape_.block_dim, moves_);
    Outcome outcome;
    expect_undamaged(outcome, "src", src_);
    expect_undamaged(outcome, "dst", dst_);
    return outcome;
  }

  std::string describe() const override { return shape_.describe(); }

 private:
  BlockCacheShape shape_;
  std::int64_t src_blocks_, dst_blocks_;
  Storage src_, dst_;
  std::vector<BlockMove> moves_;
};

}  // namespace

Op op_swap_blocks() {
  return {"swap_blocks", false, [](Rng& rng) { return std::make_unique<SwapBlocksCase>(rng); }};
}

}  // namespace attend::conformance
