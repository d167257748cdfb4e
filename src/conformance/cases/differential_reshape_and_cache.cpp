// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attend/ops/differential_cache.h"
#include "attend/oracle/quantize.h"
#include "conformance/cache_slots.h"
#include "conformance/check.h"

namespace attend::conformance {
namespace {

class DifferentialReshapeAndCacheCase final : public Case {
 public:
  explicit DifferentialReshapeAndCacheCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        cache_dtype_(rng.pick({dtype_, dtype_, DType::fp8_e4m3, DType::fp8_e5m2})),
        pairing_(rng.pick({HeadPairing::interleaved, HeadPairing::halves})),
        pairs_(rng.range(1, 5)),
        dim_(8 * rng.range(1, 32)),
        block_size_(rng.pick({1, 4, 16, 48, 64})),
        tokens_(rng.range(0, 150)) {
    const std::int64_t blocks = tokens_ / block_size_ + rng.range(1, 4);
    Layout rows;
    rows.padded = rng.chance(0.5);
    Layout cache = rows;
    cache.order = rng.pick<std::vector<int>>(
        {{0, 1, 2, 3, 4, 5}, {0, 1, 2, 4, 3, 5}, {2, 0, 1, 3, 4, 5}, {4, 2, 1, 0, 3, 5}});
    // More rows than slots: padding of a captured graph, not read.
    const std::int64_t padded_tokens = tokens_ + (rng.chance(0.3) ? rng.range(1, 9) : 0);
    for (Storage* t : {&key_, &value_}) {
      *t = Storage(rng, dtype_, {padded_tokens, 2 * pairs_, dim_}, rows);
      t->set_random(rng, 1.0);
    }
    if (cache_dtype_ != dtype_) choose_scales(rng);
    cache_ = Storage(rng, cache_dtype_, {2, 2, blocks, block_size_, pairs_, dim_}, cache);
    slots_ = random_slots(rng, tokens_, blocks * block_size_);
    cache_.freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    cache_.reset();
    DifferentialReshapeAndCacheArgs args;
    args.key = key_.view();
    args.value = value_.view();
    args.kv_cache = cache_.view();
    args.slot_mapping = {slots_.data(), DType::i64, {tokens_}};
    args.pairing = pairing_;
    if (cache_dtype_ != dtype_) {
      args.k_scale = k_scale_.view();
      args.v_scale = v_scale_.view();
    }
    differential_reshape_and_cache(args, &executor);
    Outcome outcome;
    for (int t = 0; t < tokens_; ++t) {
      if (slots_[static_cast<std::size_t>(t)] < 0) continue;
      for (std::int64_t h = 0; h < 2 * pairs_; ++h) {
        expect_head(t, h, 0, key_, k_scale_);
        expect_head(t, h, 1, value_, v_scale_);
      }
    }
    expect_undamaged(outcome, "kv_cache", cache_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{} into {}, {} tokens {} pairs {} head_dim {} block_size {}",
                       to_string(dtype_), to_string(cache_dtype_), tokens_, pairs_,
                       pairing_ == HeadPairing::halves ? "halves" : "interleaved", dim_,
                       block_size_);
  }

 private:
  void choose_scales(Rng& rng) {
    const std::int64_t n = rng.chance(0.5) ? 1 : 2 * pairs_;
    for (Storage* scale : {&k_scale_, &v_scale_}) {
      *scale = Storage(rng, DType::f32, {n});
      for (std::int64_t h = 0; h < n; ++h) scale->set(h, std::exp2(24.0 * rng.uniform() - 14.0));
    }
  }

  /// Head `h` of key (plane 0) or value (plane 1).
  void expect_head(std::int64_t t, std::int64_t h, std::int64_t plane, const Storage& rows,
                   const Storage& scale) {
    const bool halves = pairing_ == HeadPairing::halves;
    const std::int64_t branch = halves ? h / pairs_ : h % 2;
    const std::int64_t pair = halves ? h % pairs_ : h / 2;
    const std::int64_t slot = slots_[static_cast<std::size_t>(t)];
    const std::int64_t to =
        cache_.offset({branch, plane, slot / block_size_, slot % block_size_, pair, 0});
    const std::int64_t from = rows.offset({t, h, 0});
    for (std::int64_t d = 0; d < dim_; ++d) {
      if (cache_dtype_ == dtype_) {
        cache_.expect_copy(to + d, rows, from + d);
        continue;
      }
      const auto s = static_cast<float>(scale.get(scale.view().numel() == 1 ? 0 : h));
      cache_.expect_bits(to + d, oracle::fp8_code(cache_dtype_, rows.get(from + d), s));
    }
  }

  DType dtype_, cache_dtype_;
  HeadPairing pairing_;
  std::int64_t pairs_, dim_, block_size_;
  int tokens_;
  Storage key_, value_, k_scale_, v_scale_, cache_;
  std::vector<std::int64_t> slots_;
};

}  // namespace

Op op_differential_reshape_and_cache() {
  return {"differential_reshape_and_cache", false,
          [](Rng& rng) { return std::make_unique<DifferentialReshapeAndCacheCase>(rng); }};
}

}  // namespace attend::conformance
