// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attend/ops/cache.h"
#include "attend/oracle/quantize.h"
#include "conformance/cache_slots.h"
#include "conformance/check.h"

namespace attend::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class ReshapeAndCacheFlashCase final : public Case {
 public:
  explicit ReshapeAndCacheFlashCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        cache_dtype_(rng.pick({dtype_, dtype_, DType::fp8_e4m3, DType::fp8_e5m2})),
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
    if (cache_dtype_ != dtype_) choose_scales(rng);
    key_cache_ = Storage(rng, cache_dtype_, {blocks, block_size_, heads_, dim_}, cache);
    value_cache_ = Storage(rng, cache_dtype_, {blocks, block_size_, heads_, dim_v_}, cache);
    slots_ = random_slots(rng, tokens_, blocks * block_size_);
    key_cache_.freeze();
    value_cache_.freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    key_cache_.reset();
    value_cache_.reset();
    ReshapeAndCacheFlashArgs args;
    args.key = key_.view();
    args.value = value_.view();
    args.key_cache = key_cache_.view();
    args.value_cache = value_cache_.view();
    args.slot_mapping = {slots_.data(), DType::i64, {tokens_}};
    if (cache_dtype_ != dtype_) {
      args.k_scale = k_scale_.view();
      args.v_scale = v_scale_.view();
    }
    reshape_and_cache_flash(args, &executor);
    Outcome outcome;
    expect_rows(key_cache_, key_, k_scale_, dim_);
    expect_rows(value_cache_, value_, v_scale_, dim_v_);
    expect_undamaged(outcome, "key_cache", key_cache_);
    expect_undamaged(outcome, "value_cache", value_cache_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{} into {}, {} tokens {} heads head_dim {}/{} block_size {}",
                       to_string(dtype_), to_string(cache_dtype_), tokens_, heads_, dim_, dim_v_,
                       block_size_);
  }

 private:
  // Some elements far beyond and some below what the format can hold.
  void choose_scales(Rng& rng) {
    const std::int64_t n = rng.chance(0.5) ? 1 : heads_;
    for (Storage* scale : {&k_scale_, &v_scale_}) {
      *scale = Storage(rng, DType::f32, {n});
      for (std::int64_t h = 0; h < n; ++h) scale->set(h, std::exp2(24.0 * rng.uniform() - 14.0));
    }
    for (Storage* rows : {&key_, &value_}) {
      for (const std::int64_t offset : rows->offsets()) {
        if (rng.chance(0.01))
          rows->set(offset, rng.pick({1e30, -1e30, kInfinity, -kInfinity, kNan}));
      }
    }
  }

  void expect_rows(Storage& cache, const Storage& rows, const Storage& scale, int dim) const {
    for (int t = 0; t < tokens_; ++t) {
      const std::int64_t slot = slots_[static_cast<std::size_t>(t)];
      if (slot < 0) continue;
      for (int h = 0; h < heads_; ++h) {
        const std::int64_t to = cache.offset({slot / block_size_, slot % block_size_, h, 0});
        const std::int64_t from = rows.offset({t, h, 0});
        for (int d = 0; d < dim; ++d) {
          if (cache_dtype_ == dtype_) {
            cache.expect_copy(to + d, rows, from + d);
            continue;
          }
          const auto s = static_cast<float>(scale.get(scale.view().numel() == 1 ? 0 : h));
          cache.expect_bits(to + d, oracle::fp8_code(cache_dtype_, rows.get(from + d), s));
        }
      }
    }
  }

  DType dtype_, cache_dtype_;
  int heads_, dim_, dim_v_, block_size_, tokens_;
  Storage key_, value_, k_scale_, v_scale_, key_cache_, value_cache_;
  std::vector<std::int64_t> slots_;
};

}  // namespace

Op op_reshape_and_cache_flash() {
  return {"reshape_and_cache_flash", false,
          [](Rng& rng) { return std::make_unique<ReshapeAndCacheFlashCase>(rng); }};
}

}  // namespace attend::conformance
