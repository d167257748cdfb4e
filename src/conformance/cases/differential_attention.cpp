// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstring>

#include "attend/ops/differential.h"
#include "attend/oracle/differential.h"
#include "attend/plan/attention_plan.h"
#include "conformance/check.h"
#include "conformance/differential_problem.h"

namespace attend::conformance {
namespace {

class DifferentialAttentionCase final : public Case {
 public:
  explicit DifferentialAttentionCase(Rng& rng)
      : problem_(rng, random_differential_options(rng)),
        planned_(problem_.options.share_prefixes || rng.chance(0.5)),
        lengths_in_plan_only_(rng.chance(0.5)),
        expected_(oracle::differential_attention(problem_.args())) {}

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    problem_.reset();
    if (planned_) {
      run_planned(kernels, executor);
    } else {
      differential_attention(problem_.args(), &executor, kernels);
    }
    Outcome outcome;
    compare_written(outcome, problem_.options.maps ? "maps" : "out", problem_.result(),
                    expected_.out, expected_.out_bound);
    if (problem_.options.lse)
      compare_written(outcome, "lse", problem_.lse, expected_.lse, expected_.lse_bound);
    return outcome;
  }

  std::string describe() const override {
    return problem_.describe() + (planned_ ? " planned" : "");
  }

 private:
  void run_planned(const KernelOptions& kernels, Executor& executor) {
    AttentionPlanInput input = problem_.plan_input();
    input.num_workers = executor.num_workers();
    input.isa = kernels.isa;
    input.arithmetic = kernels.arithmetic;
    const AttentionPlan plan = plan_attention(input);
    Buffer workspace(plan.workspace_bytes);
    // Contents of a workspace are undefined: NaN must not reach the result.
    if (workspace.size() > 0) std::memset(workspace.data(), 0xff, workspace.size());
    DifferentialAttentionArgs args = problem_.args();
    if (lengths_in_plan_only_) {
      args.query_start_loc = {};
      args.seq_lens = {};
      args.cu_seqlens_kv = {};
    }
    differential_attention(args, plan, workspace.workspace(), executor);
  }

  DifferentialProblem problem_;
  bool planned_, lengths_in_plan_only_;
  oracle::Result expected_;
};

}  // namespace

// No choice of arithmetic: there are exact kernels alone.
Op op_differential_attention() {
  return {"differential_attention", true,
          [](Rng& rng) { return std::make_unique<DifferentialAttentionCase>(rng); }};
}

}  // namespace attend::conformance
