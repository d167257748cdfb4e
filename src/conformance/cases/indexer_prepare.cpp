// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <vector>

#include "attend/oracle/indexer.h"
#include "attend/oracle/quantize.h"
#include "conformance/check.h"
#include "conformance/storage.h"

namespace attend::conformance {
namespace {

constexpr std::int64_t kHeadDim = 128;

double as_f32(double x) { return static_cast<double>(static_cast<float>(x)); }

class IndexerPrepareCase final : public Case {
 public:
  explicit IndexerPrepareCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        tokens_(rng.range(0, 8)),
        heads_(rng.pick({1, 2, 5, 16, 64})),
        max_pos_(rng.range(1, 300)),
        flat_(rng.chance(0.5)) {
    args_.is_neox = rng.chance(0.6);
    args_.hadamard = rng.chance(0.4);
    args_.q_scale_fmt = rng.pick({IndexerScale::ue8m0, IndexerScale::unrounded});
    if (rng.chance(0.3)) args_.softmax_scale = static_cast<float>(0.01 + rng.uniform());
    if (rng.chance(0.3)) args_.k_norm_eps = 1e-3F;
    make_inputs(rng);
    make_outputs(rng);
    expected_ = oracle::prepare_indexer(args_);
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    for (Storage* s : {&codes_, &weights_out_, &k_out_}) s->reset();
    prepare_indexer(args_, &executor);
    Outcome outcome;
    for (std::int64_t t = 0; t < tokens_; ++t)
      for (std::int64_t h = 0; h < heads_; ++h) check_query(outcome, t, h);
    for (std::int64_t i = 0; i < tokens_ * kHeadDim; ++i) {
      const std::int64_t at = k_out_.offset({i / kHeadDim, i % kHeadDim});
      const auto index = static_cast<std::size_t>(i);
      compare(outcome, k_out_.get(at), expected_.k[index], expected_.k_bound[index],
              [&] { return fmt::format("k_out[{}, {}]", i / kHeadDim, i % kHeadDim); });
      k_out_.accept(at);
    }
    expect_undamaged(outcome, "q_codes", codes_);
    expect_undamaged(outcome, "weights_out", weights_out_);
    expect_undamaged(outcome, "k_out", k_out_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{}, {} tokens, {} heads, {}{}, {} scales, {} tables of {} positions",
                       to_string(dtype_), tokens_, heads_, args_.is_neox ? "neox" : "gpt-j",
                       args_.hadamard ? ", hadamard" : "",
                       args_.q_scale_fmt == IndexerScale::ue8m0 ? "ue8m0" : "unrounded",
                       to_string(tables_.view().dtype), max_pos_);
  }

 private:
  void make_inputs(Rng& rng) {
    Layout layout;
    layout.padded = rng.chance(0.5);
    const std::int64_t padded = tokens_ + (rng.chance(0.3) ? rng.range(1, 4) : 0);
    q_ = flat_ ? Storage(rng, dtype_, {padded, heads_ * kHeadDim}, layout)
               : Storage(rng, dtype_, {padded, heads_, kHeadDim}, layout);
    k_ = Storage(rng, dtype_, {padded, kHeadDim}, layout);
    weights_ = Storage(rng, rng.chance(0.5) ? DType::f32 : dtype_, {padded, heads_}, layout);
    for (std::int64_t t = 0; t < tokens_; ++t) {
      for (std::int64_t h = 0; h < heads_; ++h)
        q_.set_random(rng, flat_ ? q_.offset({t, h * kHeadDim}) : q_.offset({t, h, 0}), kHeadDim,
                      rng.chance(0.1) ? 0.0 : std::exp2(rng.range(-8, 6)));
      k_.set_random(rng, k_.offset({t, 0}), kHeadDim,
                    rng.chance(0.1) ? 0.0 : std::exp2(rng.range(-8, 6)));
      weights_.set_random(rng, weights_.offset({t, 0}), heads_, 1.0);
    }
    tables_ = Storage(rng, rng.chance(0.5) ? DType::f32 : dtype_, {max_pos_, 64}, layout);
    for (std::int64_t p = 0; p < max_pos_; ++p) {
      for (std::int64_t i = 0; i < 32; ++i) {
        const double angle = 6.28 * rng.uniform();
        tables_.set(tables_.offset({p, i}), std::cos(angle));
        tables_.set(tables_.offset({p, 32 + i}), std::sin(angle));
      }
    }
    positions_.reserve(1);  // data() is not null
    for (int t = 0; t < tokens_; ++t)
      positions_.push_back(rng.range(std::int64_t{0}, max_pos_ - 1));
    norm_weight_ = Storage(rng, DType::f32, {kHeadDim});
    norm_bias_ = Storage(rng, DType::f32, {kHeadDim});
    norm_weight_.set_random(rng, 1.0);
    norm_bias_.set_random(rng, 0.5);
    args_.q = q_.view();
    args_.k = k_.view();
    args_.weights = weights_.view();
    args_.positions = {positions_.data(), DType::i64, {tokens_}};
    args_.cos_sin_cache = tables_.view();
    args_.k_norm_weight = norm_weight_.view();
    args_.k_norm_bias = norm_bias_.view();
  }
  void make_outputs(Rng& rng) {
    Layout layout;
    layout.padded = rng.chance(0.5);
    const std::int64_t padded = tokens_ + (rng.chance(0.3) ? rng.range(1, 4) : 0);
    codes_ = Storage(rng, DType::fp8_e4m3, {padded, heads_, kHeadDim}, layout);
    weights_out_ = Storage(rng, DType::f32, {padded, heads_}, layout);
    k_out_ = Storage(rng, dtype_, {padded, kHeadDim}, layout);
    for (Storage* s : {&codes_, &weights_out_, &k_out_}) s->freeze();
    args_.q_codes = codes_.view();
    args_.weights_out = weights_out_.view();
    args_.k_out = k_out_.view();
  }

  double weight_out(std::int64_t t, std::int64_t h, double scale) const {
    const double softmax_scale = args_.softmax_scale ? static_cast<double>(*args_.softmax_scale)
                                                     : as_f32(1.0 / std::sqrt(128.0));
    const double head_scale = as_f32(1.0 / std::sqrt(static_cast<double>(heads_)));
    const double weight = weights_.get(weights_.offset({t, h}));
    return as_f32(as_f32(as_f32(weight * scale) * softmax_scale) * head_scale);
  }

  /// Codes bit for bit where the query is certain, else by what they stand for.
  void check_query(Outcome& outcome, std::int64_t t, std::int64_t h) {
    const auto begin = static_cast<std::size_t>((t * heads_ + h) * kHeadDim);
    const auto query = std::span(expected_.q).subspan(begin, kHeadDim);
    const auto bounds = std::span(expected_.q_bound).subspan(begin, kHeadDim);
    const bool power_of_two = args_.q_scale_fmt == IndexerScale::ue8m0;
    std::array<std::uint8_t, kHeadDim> codes;
    const double scale = oracle::indexer_query(query, power_of_two, codes);
    const std::int64_t weight_at = weights_out_.offset({t, h});
    if (!args_.hadamard) {
      for (std::int64_t d = 0; d < kHeadDim; ++d)
        codes_.expect_bits(codes_.offset({t, h, d}), codes[static_cast<std::size_t>(d)]);
      weights_out_.expect_f32(weight_at, static_cast<float>(weight_out(t, h, scale)));
      return;
    }
    // The scale that it took, of those that the largest element may have.
    std::vector<double> low(query.begin(), query.end()), high = low;
    for (std::size_t d = 0; d < low.size(); ++d) {
      high[d] = std::abs(low[d]) + bounds[d];
      low[d] = std::max(std::abs(low[d]) - bounds[d], 0.0);
    }
    const double lowest = oracle::indexer_query(low, power_of_two, codes);
    const double highest = oracle::indexer_query(high, power_of_two, codes);
    const double expected = weight_out(t, h, scale);
    const double off = std::max(std::abs(weight_out(t, h, highest) - expected),
                                std::abs(weight_out(t, h, lowest) - expected));
    compare(outcome, weights_out_.get(weight_at), expected, off + 0x1p-21 * std::abs(expected),
            [&] { return fmt::format("weights_out[{}, {}]", t, h); });
    weights_out_.accept(weight_at);
    for (std::size_t d = 0; d < low.size(); ++d) {
      const std::int64_t at = codes_.offset({t, h, static_cast<std::int64_t>(d)});
      // Half a step of the format, and as much as the scale may differ.
      const double code = std::abs(codes_.get(at));
      const double step = std::max(code / 16.0, 0x1p-10) * highest;
      compare(outcome, codes_.get(at) * scale, query[d],
              1.01 * (step + bounds[d] + code * (highest - lowest)),
              [&] { return fmt::format("q_codes[{}, {}, {}]", t, h, d); });
      codes_.accept(at);
    }
  }

  DType dtype_;
  int tokens_, heads_;
  std::int64_t max_pos_;
  bool flat_;
  PrepareIndexerArgs args_;
  Storage q_, k_, weights_, tables_, norm_weight_, norm_bias_, codes_, weights_out_, k_out_;
  std::vector<std::int64_t> positions_;
  oracle::PreparedIndexer expected_;
};

}  // namespace

Op op_indexer_prepare() {
  return {"indexer_prepare", false,
          [](Rng& rng) { return std::make_unique<IndexerPrepareCase>(rng); }};
}

}  // namespace attend::conformance
