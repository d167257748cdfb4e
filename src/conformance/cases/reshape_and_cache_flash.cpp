// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <vector>

#include "attend/ops/cache.h"
#include "conformance/check.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

class ReshapeAndCacheFlashCase final : public Case {
 public:
  explicit ReshapeAndCacheFlashCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        heads_(rng.range(1, 8)),
        dim_(8 * rng.range(1, 32)),
        dim_v_(rng.chance(0.7) ? dim_ : 8 * rng.range(1, 32)),
        block_size_(rng.pick({1, 4, 8, 16, 32, 48, 64, 256})),
        tokens_(rng.range(0, 200)) {
    const std::int64_t blocks = tokens_ / block_size_ + rng.range(1, 4);
    Layout rows;
    rows.padded = rng.chance(0.5);
    Layout cache = rows;
    if (rng.chance(0.5)) cache.order = {0, 2, 1, 3};
    // More rows than slots: padding of a captured graph, not read.
    const std::int64_t padded_tokens = tokens_ + (rng.chance(0.3) ? rng.range(1, 9) : 0);
    key_ = Storage(rng, dtype_, {padded_tokens, heads_, dim_}, rows);
    value_ = Storage(rng, dtype_, {padded_tokens, heads_, dim_v_}, rows);
    key_.set_random(rng, 1.0);
    value_.set_random(rng, 1.0);
    key_cache_ = Storage(rng, dtype_, {blocks, block_size_, heads_, dim_}, cache);
    value_cache_ = Storage(rng, dtype_, {blocks, block_size_, heads_, dim_v_}, cache);
    choose_slots(rng, blocks * block_size_);
    key_cache_.freeze();
    value_cache_.freeze();
  }

  Outcome run(IsaLevel, Executor& executor) override {
    key_cache_.reset();
    value_cache_.reset();
    ReshapeAndCacheFlashArgs args;
    args.key = key_.view();
    args.value = value_.view();
    args.key_cache = key_cache_.view();
    args.value_cache = value_cache_.view();
    args.slot_mapping = {slots_.data(), DType::i64, {tokens_}};
    reshape_and_cache_flash(args, &executor);
    Outcome outcome;
    expect_rows(key_cache_, key_, dim_);
    expect_rows(value_cache_, value_, dim_v_);
    expect_undamaged(outcome, "key_cache", key_cache_);
    expect_undamaged(outcome, "value_cache", value_cache_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{} {} tokens {} heads head_dim {}/{} block_size {}", to_string(dtype_),
                       tokens_, heads_, dim_, dim_v_, block_size_);
  }

 private:
  void choose_slots(Rng& rng, std::int64_t capacity) {
    const std::vector<std::int32_t> order = shuffled(rng, capacity);
    const bool repeats = rng.chance(0.2);
    slots_.reserve(static_cast<std::size_t>(tokens_) + 1);  // data() is not null without tokens
    for (int t = 0; t < tokens_; ++t) {
      std::int64_t slot = order[static_cast<std::size_t>(t)];
      if (rng.chance(0.1)) slot = -rng.range(1, 100);
      if (repeats && t > 0 && rng.chance(0.3)) slot = slots_.back();
      slots_.push_back(slot);
    }
  }

  void expect_rows(Storage& cache, const Storage& rows, int dim) const {
    for (int t = 0; t < tokens_; ++t) {
      const std::int64_t slot = slots_[static_cast<std::size_t>(t)];
      if (slot < 0) continue;
      for (int h = 0; h < heads_; ++h) {
        const std::int64_t to = cache.offset({slot / block_size_, slot % block_size_, h, 0});
        const std::int64_t from = rows.offset({t, h, 0});
        for (int d = 0; d < dim; ++d) cache.expect_copy(to + d, rows, from + d);
      }
    }
  }

  DType dtype_;
  int heads_, dim_, dim_v_, block_size_, tokens_;
  Storage key_, value_, key_cache_, value_cache_;
  std::vector<std::int64_t> slots_;
};

}  // namespace

Op op_reshape_and_cache_flash() {
  return {"reshape_and_cache_flash", false,
          [](Rng& rng) { return std::make_unique<ReshapeAndCacheFlashCase>(rng); }};
}

}  // namespace attend::conformance
