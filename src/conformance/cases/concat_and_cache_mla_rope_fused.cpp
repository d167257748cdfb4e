// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <vector>

#include "attend/ops/mla_cache.h"
#include "conformance/check.h"
#include "conformance/mla_rows.h"

namespace attend::conformance {
namespace {

// Products and sum of float32 numbers, each rounded to float32: float64 holds them well enough that
// rounding twice gives what rounding once does.
double as_f32(double x) { return static_cast<double>(static_cast<float>(x)); }

class ConcatAndCacheMlaRopeFusedCase final : public Case {
 public:
  explicit ConcatAndCacheMlaRopeFusedCase(Rng& rng)
      : problem_(rng),
        heads_(rng.range(1, 5)),
        max_pos_(rng.range(1, 300)),
        is_neox_(rng.chance(0.5)) {
    Layout layout;
    layout.padded = rng.chance(0.5);
    const MlaRows& rows = problem_.rows;
    const std::int64_t padded_tokens = problem_.kv_c.view().shape[0];
    q_pe_ = Storage(rng, rows.dtype, {padded_tokens, heads_, rows.rope}, layout);
    q_pe_.set_random(rng, 1.0);
    // NaN and infinities are for the other op: which NaN a rotation makes is not promised.
    problem_.k_pe.set_random(rng, 1.0);
    tables_ =
        Storage(rng, rng.chance(0.5) ? DType::f32 : rows.dtype, {max_pos_, rows.rope}, layout);
    for (std::int64_t p = 0; p < max_pos_; ++p) {
      for (std::int64_t i = 0; i < rows.rope / 2; ++i) {
        const double angle = 6.28 * rng.uniform();
        tables_.set(tables_.offset({p, i}), std::cos(angle));
        tables_.set(tables_.offset({p, rows.rope / 2 + i}), std::sin(angle));
      }
    }
    positions_.reserve(1);  // data() is not null
    for (int t = 0; t < problem_.tokens; ++t)
      positions_.push_back(rng.range(std::int64_t{0}, max_pos_ - 1));
    // More positions than slots: padding, not read.
    positions_.resize(positions_.size() + static_cast<std::size_t>(rng.range(0, 3)), -7);
    q_pe_.freeze();
    problem_.k_pe.freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    MlaWrite& p = problem_;
    for (Storage* s : {&p.cache, &q_pe_, &p.k_pe}) s->reset();
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      for (std::int64_t h = 0; h < heads_; ++h) expect_rotated(q_pe_, q_pe_.offset({t, h, 0}), t);
      expect_rotated(p.k_pe, p.k_pe.offset({t, 0}), t);
    }
    ConcatAndCacheMlaRopeFusedArgs args;
    args.positions = {
        positions_.data(), DType::i64, {static_cast<std::int64_t>(positions_.size())}};
    args.q_pe = q_pe_.view();
    args.k_pe = p.k_pe.view();
    args.kv_c = p.kv_c.view();
    args.cos_sin_cache = tables_.view();
    args.is_neox = is_neox_;
    args.slot_mapping = p.slot_view();
    args.kv_cache = p.cache_view();
    if (is_fp8(p.rows.stored)) args.scale = p.scale.view();
    concat_and_cache_mla_rope_fused(args, &executor);
    Outcome outcome;
    expect_undamaged(outcome, "q_pe", q_pe_);
    expect_undamaged(outcome, "k_pe", p.k_pe);
    // The keys are as expected by now, or the case has failed already.
    p.expect_rows(p.k_pe);
    expect_undamaged(outcome, "kv_cache", p.cache);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{}, {} heads, {}, {} tables of {} positions", problem_.describe(), heads_,
                       is_neox_ ? "neox" : "gpt-j", to_string(tables_.view().dtype), max_pos_);
  }

 private:
  void expect_rotated(Storage& rows, std::int64_t row, std::int64_t token) {
    const std::int64_t pairs = problem_.rows.rope / 2;
    const std::int64_t position = positions_[static_cast<std::size_t>(token)];
    for (std::int64_t i = 0; i < pairs; ++i) {
      const std::int64_t first = row + (is_neox_ ? i : 2 * i);
      const std::int64_t second = first + (is_neox_ ? pairs : 1);
      const double c = tables_.get(tables_.offset({position, i}));
      const double s = tables_.get(tables_.offset({position, pairs + i}));
      const double x = rows.get(first), y = rows.get(second);
      rows.expect_value(first, as_f32(as_f32(x * c) - as_f32(y * s)));
      rows.expect_value(second, as_f32(as_f32(x * s) + as_f32(y * c)));
    }
  }

  MlaWrite problem_;
  int heads_;
  std::int64_t max_pos_;
  bool is_neox_;
  Storage q_pe_, tables_;
  std::vector<std::int64_t> positions_;
};

}  // namespace

Op op_concat_and_cache_mla_rope_fused() {
  return {"concat_and_cache_mla_rope_fused", false,
          [](Rng& rng) { return std::make_unique<ConcatAndCacheMlaRopeFusedCase>(rng); }};
}

}  // namespace attend::conformance
