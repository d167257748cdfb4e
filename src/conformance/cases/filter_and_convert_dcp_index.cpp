// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "conformance/sparse_index_problem.h"

namespace attend::conformance {
namespace {

class FilterDcpIndexCase final : public Case {
 public:
  explicit FilterDcpIndexCase(Rng& rng)
      : world_size_(rng.range(1, 5)),
        interleave_(rng.pick({1, 1, 3, 16})),
        rank_(rng.range(0, world_size_ - 1)),
        compact_(rng.chance(0.5)),
        problem_(rng, world_size_) {}

  Outcome run(const KernelOptions&, Executor& executor) override {
    SparseIndexProblem& p = problem_;
    p.reset();
    filter_and_convert_dcp_index({.req_id = p.req_id.view(),
                                  .pages = p.pages(),
                                  .token_indices = p.token_indices.view(),
                                  .out = p.out.view(),
                                  .valid_counts = p.counts_view(),
                                  .world_size = world_size_,
                                  .interleave = interleave_,
                                  .rank = rank_,
                                  .compact_to_front = compact_},
                                 &executor);
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      p.expect_row(t, compact_, [&](std::int64_t token) {
        return p.paged_row(t, token, rank_, world_size_, interleave_);
      });
    }
    return p.outcome();
  }

  std::string describe() const override {
    return fmt::format("{}, rank {} of {}, interleave {}{}", problem_.describe(), rank_,
                       world_size_, interleave_, compact_ ? ", compacted" : "");
  }

 private:
  int world_size_, interleave_, rank_;
  bool compact_;
  SparseIndexProblem problem_;
};

}  // namespace

Op op_filter_and_convert_dcp_index() {
  return {"filter_and_convert_dcp_index", false,
          [](Rng& rng) { return std::make_unique<FilterDcpIndexCase>(rng); }};
}

}  // namespace attend::conformance
