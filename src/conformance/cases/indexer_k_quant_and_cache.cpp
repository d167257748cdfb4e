// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "attend/ops/indexer_cache.h"
#include "attend/oracle/quantize.h"
#include "conformance/cache_slots.h"
#include "conformance/check.h"

namespace attend::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class IndexerKQuantAndCacheCase final : public Case {
 public:
  explicit IndexerKQuantAndCacheCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        format_(rng.pick({IndexerScale::unrounded, IndexerScale::ue8m0})),
        block_size_(rng.pick({1, 3, 16, 64, 128})),
        tokens_(rng.range(0, 600)) {
    const std::int64_t blocks = tokens_ / block_size_ + rng.range(1, 4);
    Layout layout;
    layout.padded = rng.chance(0.5);
    k_ = Storage(rng, dtype_, {tokens_ + (rng.chance(0.3) ? rng.range(1, 9) : 0), 128}, layout);
    for (int t = 0; t < tokens_; ++t)
      k_.set_random(rng, k_.offset({t, 0}), 128,
                    rng.chance(0.1) ? 0.0 : std::exp2(rng.range(-20, 12)));
    for (const std::int64_t offset : k_.offsets()) {
      if (rng.chance(0.002)) k_.set(offset, rng.pick({1e30, -1e30, kInfinity, -kInfinity, kNan}));
    }
    // A gap between blocks only: a block itself is one piece.
    bytes_ = Storage(rng, DType::u8, {blocks, 132 * block_size_}, layout);
    slots_ = random_slots(rng, tokens_, blocks * block_size_);
    bytes_.freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    bytes_.reset();
    const TensorView bytes = bytes_.view();
    TensorView cache(bytes.data, DType::u8, {bytes.shape[0], block_size_, 132});
    cache.strides[0] = bytes.strides[0];
    indexer_k_quant_and_cache({.k = k_.view(),
                               .kv_cache = cache,
                               .slot_mapping = {slots_.data(), DType::i64, {tokens_}},
                               .scale_fmt = format_},
                              &executor);
    for (int t = 0; t < tokens_; ++t) expect_row(t);
    Outcome outcome;
    expect_undamaged(outcome, "kv_cache", bytes_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{}, {} scales, {} tokens, block_size {}", to_string(dtype_),
                       format_ == IndexerScale::ue8m0 ? "ue8m0" : "unrounded", tokens_,
                       block_size_);
  }

 private:
  void expect_row(int token) {
    const std::int64_t slot = slots_[static_cast<std::size_t>(token)];
    if (slot < 0) return;
    std::array<double, 128> key;
    for (std::int64_t i = 0; i < 128; ++i)
      key[static_cast<std::size_t>(i)] = k_.get(k_.offset({token, i}));
    std::array<std::uint8_t, 128> codes;
    const float scale = oracle::indexer_key(key, format_ == IndexerScale::ue8m0, codes);
    const std::int64_t block = slot / block_size_, offset = slot % block_size_;
    for (std::int64_t i = 0; i < 128; ++i)
      bytes_.expect_bits(bytes_.offset({block, 128 * offset + i}),
                         codes[static_cast<std::size_t>(i)]);
    const auto scale_bytes = std::bit_cast<std::array<std::uint8_t, 4>>(scale);
    for (std::int64_t i = 0; i < 4; ++i)
      bytes_.expect_bits(bytes_.offset({block, 128 * block_size_ + 4 * offset + i}),
                         scale_bytes[static_cast<std::size_t>(i)]);
  }

  DType dtype_;
  IndexerScale format_;
  int block_size_, tokens_;
  Storage k_, bytes_;
  std::vector<std::int64_t> slots_;
};

}  // namespace

Op op_indexer_k_quant_and_cache() {
  return {"indexer_k_quant_and_cache", false,
          [](Rng& rng) { return std::make_unique<IndexerKQuantAndCacheCase>(rng); }};
}

}  // namespace attend::conformance
