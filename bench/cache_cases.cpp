// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <numeric>
#include <vector>

#include "attend/cache/cache_memory.h"
#include "attend/core/workspace.h"
#include "attend/ops/cache.h"
#include "bench/harness.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

constexpr std::int64_t kTokens = 16384, kHeads = 8, kDim = 128, kBlockSize = 32;
constexpr std::int64_t kBlocks = kTokens / kBlockSize;
constexpr std::int64_t kRow = kHeads * kDim;

/// New rows of 16384 tokens scattered to slots in shuffled blocks of an HND cache.
class CacheWrite : public Problem {
 public:
  explicit CacheWrite(Executor& executor)
      : executor_(executor),
        key_(kTokens * kRow * 2),
        value_(kTokens * kRow * 2),
        key_cache_(kTokens * kRow * 2, {.executor = &executor}),
        value_cache_(kTokens * kRow * 2, {.executor = &executor}) {
    fill_random(key_.data(), DType::bf16, {0, kTokens * kRow}, 1);
    fill_random(value_.data(), DType::bf16, {0, kTokens * kRow}, 2);
    std::vector<std::int64_t> blocks(kBlocks);
    std::iota(blocks.begin(), blocks.end(), 0);
    for (std::size_t i = blocks.size() - 1; i > 0; --i)
      std::swap(blocks[i], blocks[hash64(i) % (i + 1)]);
    for (std::int64_t t = 0; t < kTokens; ++t)
      slots_.push_back(blocks[static_cast<std::size_t>(t / kBlockSize)] * kBlockSize +
                       t % kBlockSize);
    args_.key = {key_.data(), DType::bf16, {kTokens, kHeads, kDim}};
    args_.value = {value_.data(), DType::bf16, {kTokens, kHeads, kDim}};
    args_.key_cache = cache(key_cache_);
    args_.value_cache = cache(value_cache_);
    args_.slot_mapping = {slots_.data(), DType::i64, {kTokens}};
  }

  void run() override { reshape_and_cache_flash(args_, &executor_); }
  /// K and V, each read once and written once.
  double bytes() const override { return 4.0 * static_cast<double>(kTokens * kRow * 2); }

  std::string verify() const override {
    for (std::int64_t t = 0; t < kTokens; ++t)
      for (std::int64_t h = 0; h < kHeads; ++h)
        if (!same(key_, key_cache_, t, h) || !same(value_, value_cache_, t, h))
          return "token " + std::to_string(t) + " head " + std::to_string(h) +
                 " differs in the cache";
    return "";
  }

 private:
  static TensorView cache(const CacheMemory& b) {
    return TensorView{b.data(), DType::bf16, {kBlocks, kHeads, kBlockSize, kDim}}.permute(
        {0, 2, 1, 3});
  }
  bool same(const Buffer& from, const CacheMemory& to, std::int64_t t, std::int64_t h) const {
    const std::int64_t slot = slots_[static_cast<std::size_t>(t)];
    const auto* a = static_cast<const bf16*>(from.data()) + t * kRow + h * kDim;
    const auto* b = static_cast<const bf16*>(to.data()) +
                    ((slot / kBlockSize * kHeads + h) * kBlockSize + slot % kBlockSize) * kDim;
    return std::memcmp(a, b, kDim * sizeof(bf16)) == 0;
  }

  Executor& executor_;
  Buffer key_, value_;
  CacheMemory key_cache_, value_cache_;
  std::vector<std::int64_t> slots_;
  ReshapeAndCacheFlashArgs args_;
};

}  // namespace

std::vector<Case> cache_cases() {
  return {{"cache_write_bf16",
           "K and V of 16384 tokens, 8 heads of 128, into shuffled blocks of 32", Bound::memory,
           [](Executor& executor) { return std::make_unique<CacheWrite>(executor); }}};
}

}  // namespace attend::bench
