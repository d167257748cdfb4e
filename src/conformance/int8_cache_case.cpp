// SPDX-License-Identifier: Apache-2.0
#include "conformance/int8_cache_case.h"

#include <fmt/format.h>

#include <vector>

#include "attend/ops/int8_cache.h"
#include "conformance/cache_slots.h"
#include "conformance/storage.h"

namespace attend::conformance {
namespace {

class Int8CacheCase final : public Case {
 public:
  Int8CacheCase(Rng& rng, bool mixed)
      : mixed_(mixed),
        value_dtype_(mixed ? rng.pick({DType::f16, DType::bf16}) : DType::i8),
        heads_(rng.range(1, 8)),
        dim_(8 * rng.range(1, 32)),
        dim_v_(rng.chance(0.7) ? dim_ : 8 * rng.range(1, 32)),
        block_size_(rng.pick({1, 4, 16, 32, 64})),
        tokens_(rng.range(0, 200)) {
    const std::int64_t blocks = tokens_ / block_size_ + rng.range(1, 4);
    const std::int64_t rows = tokens_ + (rng.chance(0.3) ? rng.range(1, 9) : 0);
    Layout layout;
    layout.padded = rng.chance(0.5);
    key_ = Storage(rng, DType::i8, {rows, heads_, dim_}, layout);
    value_ = Storage(rng, value_dtype_, {rows, heads_, dim_v_}, layout);
    k_scale_ = Storage(rng, DType::f32, {rows, heads_}, layout);
    for (Storage* s : {&key_, &value_, &k_scale_}) s->set_random_bits(rng);
    key_cache_ = Storage(rng, DType::i8, {blocks, heads_, block_size_, dim_}, layout);
    value_cache_ = Storage(rng, value_dtype_, {blocks, heads_, block_size_, dim_v_}, layout);
    key_scale_cache_ = Storage(rng, DType::f32, {blocks, heads_, block_size_}, layout);
    slots_ = random_slots(rng, tokens_, blocks * block_size_);
    for (Storage* s : caches()) s->freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    for (Storage* s : caches()) s->reset();
    ReshapeAndCacheInt8Args args;
    args.key = key_.view();
    args.value = value_.view();
    args.k_scale = k_scale_.view();
    args.key_cache = key_cache_.view();
    args.value_cache = value_cache_.view();
    args.key_scale_cache = key_scale_cache_.view();
    args.slot_mapping = {slots_.data(), DType::i64, {tokens_}};
    if (mixed_) {
      reshape_and_cache_flash_mix(args, &executor);
    } else {
      reshape_and_cache_flash_int8(args, &executor);
    }
    for (int t = 0; t < tokens_; ++t) expect_row(t);
    Outcome outcome;
    expect_undamaged(outcome, "key_cache", key_cache_);
    expect_undamaged(outcome, "value_cache", value_cache_);
    expect_undamaged(outcome, "key_scale_cache", key_scale_cache_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("values {}, {} tokens {} heads head_dim {}/{} block_size {}",
                       to_string(value_dtype_), tokens_, heads_, dim_, dim_v_, block_size_);
  }

 private:
  std::vector<Storage*> caches() { return {&key_cache_, &value_cache_, &key_scale_cache_}; }

  void expect_row(int t) {
    const std::int64_t slot = slots_[static_cast<std::size_t>(t)];
    if (slot < 0) return;
    const std::int64_t block = slot / block_size_;
    const std::int64_t offset = slot % block_size_;
    for (int h = 0; h < heads_; ++h) {
      for (int d = 0; d < dim_; ++d) {
        key_cache_.expect_copy(key_cache_.offset({block, h, offset, d}), key_,
                               key_.offset({t, h, d}));
      }
      for (int d = 0; d < dim_v_; ++d) {
        value_cache_.expect_copy(value_cache_.offset({block, h, offset, d}), value_,
                                 value_.offset({t, h, d}));
      }
      key_scale_cache_.expect_copy(key_scale_cache_.offset({block, h, offset}), k_scale_,
                                   k_scale_.offset({t, h}));
    }
  }

  bool mixed_;
  DType value_dtype_;
  int heads_, dim_, dim_v_, block_size_, tokens_;
  Storage key_, value_, k_scale_, key_cache_, value_cache_, key_scale_cache_;
  std::vector<std::int64_t> slots_;
};

}  // namespace

std::unique_ptr<Case> make_int8_cache_case(Rng& rng, bool mixed) {
  return std::make_unique<Int8CacheCase>(rng, mixed);
}

}  // namespace attend::conformance
