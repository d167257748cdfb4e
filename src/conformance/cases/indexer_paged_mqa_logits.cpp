// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "conformance/check.h"
#include "conformance/indexer_problem.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

std::vector<std::int32_t> random_lengths(Rng& rng) {
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(rng.range(0, 3)));
  for (std::int32_t& n : lengths)
    if (rng.chance(0.85)) n = rng.range(1, rng.pick({40, 400, 1500}));
  return lengths;
}

class IndexerPagedMqaLogitsCase final : public Case {
 public:
  explicit IndexerPagedMqaLogitsCase(Rng& rng)
      : lengths_(random_lengths(rng)),
        blocks_(rng, lengths_, std::vector<std::int32_t>(lengths_.size()),
                rng.pick({1, 3, 16, 64, 128}), rng.chance(0.5)),
        next_n_(rng.range(1, 3)),
        heads_(rng.pick({1, 2, 16, 17, 32, 40, 64})),
        of_each_token_(rng.chance(0.3)),
        has_schedule_(rng.chance(0.5)),
        clean_(rng.chance(0.7)) {
    std::int64_t all = 0, longest = 0;
    for (const std::int32_t n : lengths_) {
      all += n;
      longest = std::max<std::int64_t>(longest, n);
    }
    while (all * heads_ * next_n_ > 30'000 && heads_ > 1) heads_ /= 2;
    Layout layout;
    layout.padded = rng.chance(0.5);
    const RandomCodes kind{rng.pick({0.01, 1.0, 60.0}), rng.chance(0.3) ? 0.02 : 0.0};
    const auto requests = static_cast<std::int64_t>(lengths_.size());
    q_ = Storage(rng, DType::fp8_e4m3, {requests, next_n_, heads_, 128}, layout);
    for (std::int64_t b = 0; b < requests; ++b)
      for (int n = 0; n < next_n_; ++n)
        for (int h = 0; h < heads_; ++h)
          set_codes(rng, kind, q_.view().as<std::uint8_t>() + q_.offset({b, n, h, 0}));
    weights_ = random_weights(rng, requests * next_n_, heads_, layout);
    make_lengths(rng, requests);
    bytes_ = Storage(rng, DType::u8, {blocks_.num_blocks, 132 * blocks_.block_size}, layout);
    write_keys(rng, kind);
    logits_ = Storage(rng, DType::f32, {requests * next_n_, longest + rng.range(0, 70)}, layout);
    logits_.freeze();
    expected_ = oracle::fp8_paged_mqa_logits(args());
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    logits_.reset();
    fp8_paged_mqa_logits(args(), &executor, kernels.isa);
    Outcome outcome;
    compare_logits(outcome, logits_, expected_, clean_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("requests of {} tokens, {} query tokens each{}, {} heads, block_size {}{}{}",
                       lengths_, next_n_, of_each_token_ ? " with lengths of their own" : "",
                       heads_, blocks_.block_size, has_schedule_ ? ", a schedule" : "",
                       clean_ ? "" : ", others untouched");
  }

 private:
  void make_lengths(Rng& rng, std::int64_t requests) {
    context_lens_ = int_storage(rng, lengths_);
    if (of_each_token_) {
      context_lens_ = Storage(rng, DType::i32, {requests, next_n_});
      for (std::int64_t i = 0; i < requests * next_n_; ++i)
        context_lens_.view().as<std::int32_t>()[i] =
            rng.range(0, lengths_[static_cast<std::size_t>(i / next_n_)]);
    }
    if (!has_schedule_) return;
    schedule_ = Storage(rng, DType::i32, {rng.range(1, 140) + 1, 2});
    get_paged_mqa_logits_metadata({context_lens_.view(), blocks_.block_size, schedule_.view()});
  }
  void write_keys(Rng& rng, const RandomCodes& kind) {
    for (std::size_t r = 0; r < lengths_.size(); ++r) {
      for (std::int64_t token = 0; token < lengths_[r]; ++token) {
        auto* block = bytes_.view().as<std::uint8_t>() +
                      bytes_.offset({blocks_.block(static_cast<int>(r), token), 0});
        const std::int64_t offset = token % blocks_.block_size;
        set_codes(rng, kind, block + 128 * offset);
        const float scale = random_scale(rng);
        std::memcpy(block + 128 * blocks_.block_size + 4 * offset, &scale, 4);
      }
    }
  }

  Fp8PagedMqaLogitsArgs args() const {
    const TensorView bytes = bytes_.view();
    TensorView cache(bytes.data, DType::u8, {bytes.shape[0], blocks_.block_size, 132});
    cache.strides[0] = bytes.strides[0];
    return {.q = q_.view(),
            .kv_cache = cache,
            .weights = weights_.view(),
            .context_lens = context_lens_.view(),
            .block_table = blocks_.table.view(),
            .schedule_metadata = schedule_.view(),
            .logits = logits_.view(),
            .clean_logits = clean_};
  }

  std::vector<std::int32_t> lengths_;
  RandomBlocks blocks_;
  int next_n_, heads_;
  bool of_each_token_, has_schedule_, clean_;
  Storage q_, weights_, context_lens_, bytes_, schedule_, logits_;
  oracle::IndexerLogits expected_;
};

}  // namespace

Op op_indexer_paged_mqa_logits() {
  return {"indexer_paged_mqa_logits", true,
          [](Rng& rng) { return std::make_unique<IndexerPagedMqaLogitsCase>(rng); }};
}

}  // namespace attend::conformance
