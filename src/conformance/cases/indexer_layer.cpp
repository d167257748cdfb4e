// SPDX-License-Identifier: Apache-2.0
// The whole indexer of a decode step: from projections to the tokens that are chosen.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include "attend/ops/top_k.h"
#include "attend/oracle/indexer.h"
#include "attend/oracle/quantize.h"
#include "conformance/check.h"
#include "conformance/random_blocks.h"
#include "conformance/storage.h"

namespace attend::conformance {
namespace {

constexpr std::int64_t kDim = 128;

class IndexerLayerCase final : public Case {
 public:
  explicit IndexerLayerCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        length_(rng.range(1, 400)),
        heads_(rng.pick({1, 4, 16, 40})),
        k_(rng.pick({1, 16, 100, 600})),
        lengths_{length_},
        blocks_(rng, lengths_, std::vector<std::int32_t>(1), rng.pick({16, 64}), false) {
    q_ = random_rows(rng, dtype_, heads_ * kDim);
    keys_ = random_rows(rng, dtype_, kDim);
    weights_ = random_rows(rng, DType::f32, heads_);
    tables_ = Storage(rng, DType::f32, {length_, 64});
    for (std::int64_t p = 0; p < length_; ++p) {
      for (std::int64_t i = 0; i < 32; ++i) {
        const double angle = static_cast<double>(p) * std::exp2(-0.4 * static_cast<double>(i));
        tables_.set(tables_.offset({p, i}), std::cos(angle));
        tables_.set(tables_.offset({p, 32 + i}), std::sin(angle));
      }
    }
    norm_ = Storage(rng, DType::f32, {2, kDim});
    norm_.set_random(rng, 1.0);
    is_neox_ = rng.chance(0.5);
    codes_ = Storage(rng, DType::fp8_e4m3, {length_, heads_, kDim});
    weights_out_ = Storage(rng, DType::f32, {length_, heads_});
    k_out_ = Storage(rng, dtype_, {length_, kDim});
    cache_ = Storage(rng, DType::u8, {blocks_.num_blocks, blocks_.block_size, 132});
    logits_ = Storage(rng, DType::f32, {1, length_});
    out_ = Storage(rng, DType::i32, {1, k_});
    positions_.resize(static_cast<std::size_t>(length_));
    std::iota(positions_.begin(), positions_.end(), 0);
    for (std::int64_t t = 0; t < length_; ++t)
      slots_.push_back(std::int64_t{blocks_.block(0, t)} * blocks_.block_size +
                       t % blocks_.block_size);
    expect_logits();
  }

  /// All tokens are prepared and cached; the last one is the query.
  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    prepare_indexer(prepare_args(), &executor);
    indexer_k_quant_and_cache({.k = k_out_.view(),
                               .kv_cache = cache_.view(),
                               .slot_mapping = {slots_.data(), DType::i64, {length_}},
                               .scale_fmt = IndexerScale::ue8m0},
                              &executor);
    const ConstTensorView lens(lengths_.data(), DType::i32, {1});
    const TensorView codes(codes_.view().as<std::uint8_t>() + (length_ - 1) * heads_ * kDim,
                           DType::fp8_e4m3, {1, 1, heads_, kDim});
    fp8_paged_mqa_logits({.q = codes,
                          .kv_cache = cache_.view(),
                          .weights = weights_out_.view().slice(0, length_ - 1, 1),
                          .context_lens = lens,
                          .block_table = blocks_.table.view(),
                          .schedule_metadata = {},
                          .logits = logits_.view()},
                         &executor, kernels.isa);
    top_k_per_row_decode({logits_.view(), lens, 1, out_.view()}, &executor);
    Outcome outcome;
    for (std::int64_t j = 0; j < length_; ++j) {
      const auto at = static_cast<std::size_t>(j);
      compare(outcome, logits_.get(j), expected_.logits[at], expected_.bound[at],
              [&] { return fmt::format("logits[{}]", j); });
    }
    const std::span chosen(out_.view().as<std::int32_t>(), static_cast<std::size_t>(k_));
    if (!oracle::may_be_top_k(expected_.logits, expected_.bound, chosen))
      outcome.fail("the choice is none of the highest logits");
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{}, {} tokens, {} heads, top {}, {}", to_string(dtype_), length_, heads_,
                       k_, is_neox_ ? "neox" : "gpt-j");
  }

 private:
  Storage random_rows(Rng& rng, DType dtype, std::int64_t columns) const {
    Storage rows(rng, dtype, {length_, columns});
    rows.set_random(rng, 1.0);
    return rows;
  }
  PrepareIndexerArgs prepare_args() const {
    PrepareIndexerArgs a;
    a.q = q_.view();
    a.k = keys_.view();
    a.weights = weights_.view();
    a.positions = {positions_.data(), DType::i64, {length_}};
    a.cos_sin_cache = tables_.view();
    a.is_neox = is_neox_;
    a.k_norm_weight = norm_.view().select(0, 0);
    a.k_norm_bias = norm_.view().select(0, 1);
    a.q_codes = codes_.view();
    a.weights_out = weights_out_.view();
    a.k_out = k_out_.view();
    return a;
  }

  /// From the projections alone: prepared, encoded and multiplied in float64.
  void expect_logits() {
    const oracle::PreparedIndexer prepared = oracle::prepare_indexer(prepare_args());
    std::vector<std::uint8_t> q(static_cast<std::size_t>(heads_ * kDim));
    std::vector<std::uint8_t> k(static_cast<std::size_t>(length_ * kDim));
    std::vector<float> weights, scales;
    const std::int64_t token = length_ - 1;
    for (std::int64_t h = 0; h < heads_; ++h) {
      const auto query = std::span(prepared.q)
                             .subspan(static_cast<std::size_t>((token * heads_ + h) * kDim), kDim);
      const float scale = oracle::indexer_query(
          query, true, std::span(q).subspan(static_cast<std::size_t>(h * kDim), kDim));
      const auto weight = static_cast<float>(weights_.get(weights_.offset({token, h})));
      weights.push_back(weight * scale * static_cast<float>(1.0 / std::sqrt(128.0)) *
                        static_cast<float>(1.0 / std::sqrt(static_cast<double>(heads_))));
    }
    for (std::int64_t j = 0; j < length_; ++j) {
      const auto at = static_cast<std::size_t>(j * kDim);
      scales.push_back(oracle::indexer_key(std::span(prepared.k).subspan(at, kDim), true,
                                           std::span(k).subspan(at, kDim)));
    }
    const std::int32_t begin = 0, end = length_;
    expected_ = oracle::fp8_mqa_logits({.q = {q.data(), DType::fp8_e4m3, {1, heads_, kDim}},
                                        .k = {k.data(), DType::fp8_e4m3, {length_, kDim}},
                                        .k_scale = {scales.data(), DType::f32, {length_}},
                                        .weights = {weights.data(), DType::f32, {1, heads_}},
                                        .ks = {&begin, DType::i32, {1}},
                                        .ke = {&end, DType::i32, {1}},
                                        .logits = logits_.view()});
  }

  DType dtype_;
  int length_, heads_, k_;
  std::vector<std::int32_t> lengths_;
  RandomBlocks blocks_;
  bool is_neox_ = true;
  Storage q_, keys_, weights_, tables_, norm_, codes_, weights_out_, k_out_, cache_, logits_, out_;
  std::vector<std::int64_t> positions_, slots_;
  oracle::IndexerLogits expected_;
};

}  // namespace

Op op_indexer_layer() {
  return {"indexer_layer", true, [](Rng& rng) { return std::make_unique<IndexerLayerCase>(rng); }};
}

}  // namespace attend::conformance
