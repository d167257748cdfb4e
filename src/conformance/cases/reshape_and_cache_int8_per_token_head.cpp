// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attend/ops/int8_cache.h"
#include "attend/oracle/quantize.h"
#include "conformance/cache_slots.h"
#include "conformance/check.h"
#include "conformance/storage.h"

namespace attend::conformance {
namespace {

class PerTokenHeadCase final : public Case {
 public:
  explicit PerTokenHeadCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        heads_(rng.range(1, 8)),
        dim_(8 * rng.range(1, 32)),
        dim_v_(rng.chance(0.7) ? dim_ : 8 * rng.range(1, 32)),
        block_size_(rng.pick({1, 4, 16, 32, 64})),
        tokens_(rng.range(0, 150)) {
    const std::int64_t blocks = tokens_ / block_size_ + rng.range(1, 4);
    const std::int64_t rows = tokens_ + (rng.chance(0.3) ? rng.range(1, 9) : 0);
    Layout rows_layout;
    rows_layout.padded = rng.chance(0.5);
    Layout cache = rows_layout, scales = rows_layout;
    if (rng.chance(0.5)) {
      cache.order = {0, 2, 1, 3};
      scales.order = {0, 2, 1};
    }
    key_ = Storage(rng, dtype_, {rows, heads_, dim_}, rows_layout);
    value_ = Storage(rng, dtype_, {rows, heads_, dim_v_}, rows_layout);
    fill(rng, key_, dim_);
    fill(rng, value_, dim_v_);
    key_cache_ = Storage(rng, DType::i8, {blocks, block_size_, heads_, dim_}, cache);
    value_cache_ = Storage(rng, DType::i8, {blocks, block_size_, heads_, dim_v_}, cache);
    key_scales_ = Storage(rng, DType::f32, {blocks, block_size_, heads_}, scales);
    value_scales_ = Storage(rng, DType::f32, {blocks, block_size_, heads_}, scales);
    slots_ = random_slots(rng, tokens_, blocks * block_size_);
    for (Storage* s : caches()) s->freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    for (Storage* s : caches()) s->reset();
    ReshapeAndCachePerTokenHeadArgs args;
    args.key = key_.view();
    args.value = value_.view();
    args.key_cache = key_cache_.view();
    args.value_cache = value_cache_.view();
    args.key_scale_cache = key_scales_.view();
    args.value_scale_cache = value_scales_.view();
    args.slot_mapping = {slots_.data(), DType::i64, {tokens_}};
    reshape_and_cache_int8_per_token_head(args, &executor);
    expect_rows(key_cache_, key_scales_, key_, dim_);
    expect_rows(value_cache_, value_scales_, value_, dim_v_);
    Outcome outcome;
    expect_undamaged(outcome, "key_cache", key_cache_);
    expect_undamaged(outcome, "value_cache", value_cache_);
    expect_undamaged(outcome, "key_scale_cache", key_scales_);
    expect_undamaged(outcome, "value_scale_cache", value_scales_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{} {} tokens {} heads head_dim {}/{} block_size {}", to_string(dtype_),
                       tokens_, heads_, dim_, dim_v_, block_size_);
  }

 private:
  std::vector<Storage*> caches() {
    return {&key_cache_, &value_cache_, &key_scales_, &value_scales_};
  }

  // Rows of different sizes, a few without a finite scale.
  void fill(Rng& rng, Storage& rows, int dim) const {
    for (int t = 0; t < tokens_; ++t) {
      for (int h = 0; h < heads_; ++h) {
        const std::int64_t at = rows.offset({t, h, 0});
        rows.set_random(rng, at, dim, rng.chance(0.05) ? 0.0 : std::exp2(12.0 * rng.uniform() - 6));
        if (rng.chance(0.02)) {
          rows.set(at + rng.range(0, dim - 1), std::numeric_limits<double>::infinity());
        }
      }
    }
  }

  void expect_rows(Storage& cache, Storage& scales, const Storage& rows, int dim) const {
    std::vector<double> row(static_cast<std::size_t>(dim));
    for (int t = 0; t < tokens_; ++t) {
      const std::int64_t slot = slots_[static_cast<std::size_t>(t)];
      if (slot < 0) continue;
      const std::int64_t block = slot / block_size_, offset = slot % block_size_;
      for (int h = 0; h < heads_; ++h) {
        const std::int64_t from = rows.offset({t, h, 0});
        for (int d = 0; d < dim; ++d) row[static_cast<std::size_t>(d)] = rows.get(from + d);
        const float scale = oracle::int8_scale(row);
        scales.expect_f32(scales.offset({block, offset, h}), scale);
        const std::int64_t to = cache.offset({block, offset, h, 0});
        for (int d = 0; d < dim; ++d) {
          const std::int8_t code = oracle::int8_code(row[static_cast<std::size_t>(d)], scale);
          cache.expect_bits(to + d, static_cast<std::uint8_t>(code));
        }
      }
    }
  }

  DType dtype_;
  int heads_, dim_, dim_v_, block_size_, tokens_;
  Storage key_, value_, key_cache_, value_cache_, key_scales_, value_scales_;
  std::vector<std::int64_t> slots_;
};

}  // namespace

Op op_reshape_and_cache_int8_per_token_head() {
  return {"reshape_and_cache_int8_per_token_head", false,
          [](Rng& rng) { return std::make_unique<PerTokenHeadCase>(rng); }};
}

}  // namespace attend::conformance
