// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "attend/ops/attention.h"
#include "attend/oracle/attention.h"
#include "attend/plan/attention_plan.h"
#include "conformance/check.h"
#include "conformance/varlen_problem.h"

namespace attend::conformance {
namespace {

class FlashAttnVarlenCase final : public Case {
 public:
  explicit FlashAttnVarlenCase(Rng& rng)
      : problem_(rng, random_shape(rng), random_varlen_options(rng)),
        planned_(rng.chance(0.5)),
        lengths_in_plan_only_(rng.chance(0.5)),
        expected_(oracle::flash_attn_varlen(problem_.args())) {}

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    problem_.reset();
    if (planned_) {
      run_planned(kernels, executor);
    } else {
      flash_attn_varlen(problem_.args(), &executor, kernels);
    }
    Outcome outcome;
    compare_written(outcome, "out", problem_.out, expected_.out, expected_.out_bound);
    if (problem_.options.lse) {
      compare_written(outcome, "lse", problem_.lse, expected_.lse, expected_.lse_bound);
    }
    return outcome;
  }

  std::optional<KernelKind> kind() const override { return problem_.kind(); }

  std::string describe() const override {
    return problem_.describe() + (planned_ ? " planned" : "");
  }

 private:
  void run_planned(const KernelOptions& kernels, Executor& executor) {
    const AttentionShape& s = problem_.shape;
    const std::vector<std::int32_t> query_start_loc = s.query_start_loc();
    AttentionPlanInput input;
    input.query_start_loc = query_start_loc;
    input.seq_lens = s.seq_lens;
    input.num_q_heads = s.q_heads();
    input.num_kv_heads = s.kv_heads;
    input.head_dim_qk = s.head_dim;
    input.head_dim_v = s.head_dim_v;
    input.causal = s.causal;
    input.window_left = s.window_left;
    input.window_right = s.window_right;
    input.num_workers = executor.num_workers();
    input.isa = kernels.isa;
    input.arithmetic = kernels.arithmetic;
    const AttentionPlan plan = plan_attention(input);
    Buffer workspace(plan.workspace_bytes);
    // Contents of a workspace are undefined: NaN must not reach the result.
    if (workspace.size() > 0) std::memset(workspace.data(), 0xff, workspace.size());
    FlashAttnVarlenArgs args = problem_.args();
    if (lengths_in_plan_only_) {
      args.query_start_loc = {};
      args.seq_lens = {};
      args.cu_seqlens_kv = {};
    }
    flash_attn_varlen(args, plan, workspace.workspace(), executor);
  }

  VarlenProblem problem_;
  bool planned_, lengths_in_plan_only_;
  oracle::Result expected_;
};

}  // namespace

Op op_flash_attn_varlen() {
  return {"flash_attn_varlen", true,
          [](Rng& rng) { return std::make_unique<FlashAttnVarlenCase>(rng); }, true};
}

}  // namespace attend::conformance
