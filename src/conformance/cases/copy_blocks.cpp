// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/cache.h"
#include "conformance/block_moves.h"
#include "conformance/check.h"

namespace attend::conformance {
namespace {

class CopyBlocksCase final : public Case {
 public:
  explicit CopyBlocksCase(Rng& rng)
      : shape_(rng), blocks_(rng.range(std::int64_t{1}, std::int64_t{9})) {
    const int layers = rng.range(0, 3);
    for (int i = 0; i < layers; ++i) {
      caches_.push_back(shape_.make(rng, blocks_));
      caches_.back().freeze();
    }
    moves_ = random_moves(rng, blocks_, blocks_);
  }

  Outcome run(const KernelOptions&, Executor&) override {
    std::vector<TensorView> views;
    for (Storage& cache : caches_) {
      cache.reset();
      views.push_back(cache.view());
    }
    for (Storage& cache : caches_) {
      // Moves apply in order, so a later one may copy what an earlier one brought.
      for (const BlockMove& move : moves_) expect_move(cache, cache, shape_.block_dim, move);
    }
    copy_blocks(views, shape_.block_dim, moves_);
    Outcome outcome;
    for (const Storage& cache : caches_) expect_undamaged(outcome, "cache", cache);
    return outcome;
  }

  std::string describe() const override { return shape_.describe(); }

 private:
  BlockCacheShape shape_;
  std::int64_t blocks_;
  std::vector<Storage> caches_;
  std::vector<BlockMove> moves_;
};

}  // namespace

Op op_copy_blocks() {
  return {"copy_blocks", false, [](Rng& rng) { return std::make_unique<CopyBlocksCase>(rng); }};
}

}  // namespace attend::conformance
