// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>

#include "attend/ops/top_k.h"
#include "conformance/top_k_problem.h"

namespace attend::conformance {
namespace {

class TopKPerRowDecodeCase final : public Case {
 public:
  explicit TopKPerRowDecodeCase(Rng& rng)
      : next_n_(rng.range(1, 4)), problem_(rng, next_n_ * rng.range(0, 3)) {
    for (std::int64_t b = 0; b < problem_.rows / next_n_; ++b)
      seq_lens_.push_back(static_cast<std::int32_t>(rng.range(std::int64_t{0}, problem_.width)));
    for (std::int64_t row = 0; row < problem_.rows; ++row) problem_.fill(rng, row, 0, length(row));
    seq_lens_storage_ = int_storage(rng, seq_lens_);
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    problem_.out.reset();
    top_k_per_row_decode({.logits = problem_.logits.view(),
                          .seq_lens = seq_lens_storage_.view(),
                          .next_n = next_n_,
                          .out = problem_.out.view()},
                         &executor);
    for (std::int64_t row = 0; row < problem_.rows; ++row) problem_.expect_row(row, 0, length(row));
    return problem_.outcome();
  }

  std::string describe() const override {
    return fmt::format("{}, {} a request", problem_.describe(), next_n_);
  }

 private:
  // The last token of a request sees all of it, those before one less each.
  std::int64_t length(std::int64_t row) const {
    const std::int64_t later_tokens = next_n_ - 1 - row % next_n_;
    return std::max<std::int64_t>(seq_lens_[static_cast<std::size_t>(row / next_n_)] - later_tokens,
                                  0);
  }

  int next_n_;
  TopKProblem problem_;
  std::vector<std::int32_t> seq_lens_;
  Storage seq_lens_storage_;
};

}  // namespace

Op op_top_k_per_row_decode() {
  return {"top_k_per_row_decode", false,
          [](Rng& rng) { return std::make_unique<TopKPerRowDecodeCase>(rng); }};
}

}  // namespace attend::conformance
