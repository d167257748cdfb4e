// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/top_k.h"
#include "conformance/top_k_problem.h"

namespace attend::conformance {
namespace {

class TopKPerRowPrefillCase final : public Case {
 public:
  explicit TopKPerRowPrefillCase(Rng& rng) : problem_(rng, rng.range(0, 8)) {
    for (std::int64_t row = 0; row < problem_.rows; ++row) {
      const std::int64_t begin = rng.chance(0.5) ? 0 : rng.range(std::int64_t{0}, problem_.width);
      starts_.push_back(static_cast<std::int32_t>(begin));
      ends_.push_back(static_cast<std::int32_t>(rng.range(begin, problem_.width)));
      problem_.fill(rng, row, begin, ends_.back());
    }
    starts_storage_ = int_storage(rng, starts_);
    ends_storage_ = int_storage(rng, ends_);
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    problem_.out.reset();
    top_k_per_row_prefill({.logits = problem_.logits.view(),
                           .row_starts = starts_storage_.view(),
                           .row_ends = ends_storage_.view(),
                           .out = problem_.out.view()},
                          &executor);
    for (std::int64_t row = 0; row < problem_.rows; ++row) {
      const auto at = static_cast<std::size_t>(row);
      problem_.expect_row(row, starts_[at], ends_[at]);
    }
    return problem_.outcome();
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  TopKProblem problem_;
  std::vector<std::int32_t> starts_, ends_;
  Storage starts_storage_, ends_storage_;
};

}  // namespace

Op op_top_k_per_row_prefill() {
  return {"top_k_per_row_prefill", false,
          [](Rng& rng) { return std::make_unique<TopKPerRowPrefillCase>(rng); }};
}

}  // namespace attend::conformance
