// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "conformance/check.h"
#include "conformance/indexer_problem.h"

namespace attend::conformance {
namespace {

class IndexerMqaLogitsCase final : public Case {
 public:
  explicit IndexerMqaLogitsCase(Rng& rng)
      : heads_(rng.pick({1, 2, 15, 16, 17, 32, 33, 48, 64, 80})),
        keys_(rng.pick({0, 1, 31, 32, 33, 64, 100, 300, 1030, 2100})),
        rows_(rng.chance(0.1) ? rng.range(60, 130) : rng.range(0, 6)),
        clean_(rng.chance(0.7)) {
    // Float64 takes its time.
    while (std::int64_t{heads_} * keys_ * rows_ > 30'000 && (rows_ > 1 || heads_ > 1))
      (rows_ > 1 ? rows_ : heads_) /= 2;
    Layout layout;
    layout.padded = rng.chance(0.5);
    const RandomCodes kind{rng.pick({0.01, 1.0, 60.0}), rng.chance(0.3) ? 0.02 : 0.0};
    q_ = Storage(rng, DType::fp8_e4m3, {rows_, heads_, 128}, layout);
    for (int i = 0; i < rows_; ++i)
      for (int h = 0; h < heads_; ++h) set_codes(rng, kind, element(q_, {i, h, 0}));
    weights_ = random_weights(rng, rows_, heads_, layout);
    find_keys(rng, layout, kind);
    logits_ = Storage(rng, DType::f32, {rows_, keys_}, layout);
    logits_.freeze();
    expected_ = oracle::fp8_mqa_logits(args());
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    logits_.reset();
    fp8_mqa_logits(args(), &executor, kernels.isa);
    Outcome outcome;
    compare_logits(outcome, logits_, expected_, clean_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{} rows of {} heads, {} keys{}", rows_, heads_, keys_,
                       clean_ ? "" : ", others untouched");
  }

 private:
  static void* element(const Storage& s, std::initializer_list<std::int64_t> index) {
    return s.view().as<std::uint8_t>() + s.offset(index);
  }
  /// Ranges of the rows, and the keys that one of them sees.
  void find_keys(Rng& rng, const Layout& layout, const RandomCodes& kind) {
    std::vector<std::int32_t> starts, ends;
    std::vector<bool> seen(static_cast<std::size_t>(keys_), false);
    for (int i = 0; i < rows_; ++i) {
      starts.push_back(rng.chance(0.5) ? 0 : rng.range(0, keys_));
      ends.push_back(rng.range(starts.back(), keys_));
      std::fill(seen.begin() + starts.back(), seen.begin() + ends.back(), true);
    }
    ks_ = int_storage(rng, starts);
    ke_ = int_storage(rng, ends);
    k_ = Storage(rng, DType::fp8_e4m3, {keys_, 128}, layout);
    k_scale_ = Storage(rng, DType::f32, {keys_});
    for (int j = 0; j < keys_; ++j) {
      if (!seen[static_cast<std::size_t>(j)]) continue;
      set_codes(rng, kind, element(k_, {j, 0}));
      k_scale_.view().as<float>()[j] = random_scale(rng);
    }
  }

  Fp8MqaLogitsArgs args() const {
    return {.q = q_.view(),
            .k = k_.view(),
            .k_scale = k_scale_.view(),
            .weights = weights_.view(),
            .ks = ks_.view(),
            .ke = ke_.view(),
            .logits = logits_.view(),
            .clean_logits = clean_};
  }

  int heads_, keys_, rows_;
  bool clean_;
  Storage q_, k_, k_scale_, weights_, ks_, ke_, logits_;
  oracle::IndexerLogits expected_;
};

}  // namespace

Op op_indexer_mqa_logits() {
  return {"indexer_mqa_logits", true,
          [](Rng& rng) { return std::make_unique<IndexerMqaLogitsCase>(rng); }};
}

}  // namespace attend::conformance
