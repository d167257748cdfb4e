// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/int8_attention.h"

#include <cmath>

#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/int8_attention_problem.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "flash_attn_varlen_int8";

}  // namespace

void validate(const FlashAttnVarlenInt8Args& args, const AttentionPlan& plan, Workspace workspace,
              const Executor& executor) {
  ops::check_int8_tensors(kOp, args);
  ops::check_int8_planned(kOp, args, plan, workspace, executor);
}

void flash_attn_varlen_int8(const FlashAttnVarlenInt8Args& args, const AttentionPlan& plan,
                            Workspace workspace, Executor& executor) {
  validate(args, plan, workspace, executor);
  ops::run_plan(ops::int8_problem(args, plan), plan, workspace, executor);
}

void flash_attn_varlen_int8(const FlashAttnVarlenInt8Args& args, Executor* executor,
                            std::optional<IsaLevel> isa) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  ops::check_int8_tensors(kOp, args);
  const AttentionPlan plan = ops::plan_int8(kOp, args, run_on.num_workers(), isa);
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes);
  ops::check_int8_planned(kOp, args, plan, workspace, run_on);
  ops::run_plan(ops::int8_problem(args, plan), plan, workspace, run_on);
}

}  // namespace attend
