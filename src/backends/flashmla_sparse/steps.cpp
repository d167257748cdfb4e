// SPDX-License-Identifier: Apache-2.0
#include "backends/flashmla_sparse/steps.h"

namespace attend::flashmla_sparse {
namespace {

class Cutter {
 public:
  explicit Cutter(const Requests& requests) : requests_(requests) {}

  /// Adds the next request to the last step, or to a new one.
  void add(int r, bool gathered, std::int64_t room) {
    const bool fits = !steps_.empty() && steps_.back().gathered == gathered &&
                      (!gathered || steps_.back().rows + requests_.rows(r) <= room);
    if (!fits) {
      Step step;
      step.request_begin = r;
      step.token_begin = requests_.query_start_loc[static_cast<std::size_t>(r)];
      step.gathered = gathered;
      steps_.push_back(std::move(step));
    }
    Step& step = steps_.back();
    step.request_end = r + 1;
    step.token_end = requests_.query_start_loc[static_cast<std::size_t>(r) + 1];
    if (!gathered) return;
    step.workspace_starts.push_back(step.rows);
    step.rows += requests_.rows(r);
  }
  std::vector<Step> take() { return std::move(steps_); }

 private:
  const Requests& requests_;
  std::vector<Step> steps_;
};

}  // namespace

std::vector<Step> mixed_steps(const Requests& requests) {
  Cutter cutter(requests);
  for (int r = 0; r < requests.num_reqs; ++r) cutter.add(r, false, 0);
  return cutter.take();
}

std::vector<Step> separate_steps(const Requests& requests, int first_prefill,
                                 std::int64_t workspace_rows) {
  Cutter cutter(requests);
  for (int r = 0; r < requests.num_reqs; ++r)
    cutter.add(r, r >= first_prefill && requests.rows(r) <= workspace_rows, workspace_rows);
  return cutter.take();
}

}  // namespace attend::flashmla_sparse
