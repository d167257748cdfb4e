// SPDX-License-Identifier: Apache-2.0
#include "conformance/sparse_index_problem.h"

namespace attend::conformance {
namespace {

class ConvertReqIndexCase final : public Case {
 public:
  explicit ConvertReqIndexCase(Rng& rng) : problem_(rng, 1), has_workspace_(rng.chance(0.5)) {
    if (!has_workspace_) return;
    for (std::int64_t p = rng.range(0, 4); p > 0; --p)
      starts_.push_back(
          static_cast<std::int32_t>(rng.chance(0.1) ? problem_.hostile(rng) : rng.range(0, 900)));
    for (std::int64_t t = 0; t < problem_.tokens; ++t)
      ids_.push_back(
          static_cast<std::int32_t>(rng.chance(0.05) ? problem_.hostile(rng) : rng.range(-1, 3)));
    ids_storage_ = int_storage(rng, ids_);
    starts_storage_ = int_storage(rng, starts_);
    workspace_rows_ = rng.range(0, 1200);
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    SparseIndexProblem& p = problem_;
    p.reset();
    ConvertReqIndexToGlobalIndexArgs args{.req_id = p.req_id.view(),
                                          .pages = p.pages(),
                                          .token_indices = p.token_indices.view(),
                                          .out = p.out.view(),
                                          .valid_counts = p.counts_view()};
    if (has_workspace_) {
      args.prefill_workspace_request_ids = ids_storage_.view();
      args.prefill_workspace_starts = starts_storage_.view();
      args.workspace_rows = workspace_rows_;
    }
    convert_req_index_to_global_index(args, &executor);
    for (std::int64_t t = 0; t < p.tokens; ++t)
      p.expect_row(t, false, [&](std::int64_t token) { return expected(t, token); });
    return p.outcome();
  }

  std::string describe() const override {
    return problem_.describe() + (has_workspace_ ? ", with a workspace" : "");
  }

 private:
  std::int64_t expected(std::int64_t t, std::int64_t token) const {
    const std::int64_t id = has_workspace_ ? ids_[static_cast<std::size_t>(t)] : -1;
    if (id < 0) return problem_.paged_row(t, token, 0, 1);
    if (token < 0 || id >= static_cast<std::int64_t>(starts_.size())) return -1;
    const std::int64_t row = starts_[static_cast<std::size_t>(id)] + token;
    return row < 0 || row >= workspace_rows_ ? -1 : row;
  }

  SparseIndexProblem problem_;
  bool has_workspace_;
  std::int64_t workspace_rows_ = 0;
  std::vector<std::int32_t> ids_, starts_;
  Storage ids_storage_, starts_storage_;
};

}  // namespace

Op op_convert_req_index_to_global_index() {
  return {"convert_req_index_to_global_index", false,
          [](Rng& rng) { return std::make_unique<ConvertReqIndexCase>(rng); }};
}

}  // namespace attend::conformance
