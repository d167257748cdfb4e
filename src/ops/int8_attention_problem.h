// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <string_view>

#include "attend/ops/int8_attention.h"
#include "kernels/cpu/attention/attention.h"

/// What the ops over int8 queries and keys share; `op` is the name that errors carry.
namespace attend::ops {

/// Everything that needs no plan.
void check_int8_tensors(std::string_view op, const FlashAttnVarlenInt8Args& args);

/// Everything else. @pre check_int8_tensors passed.
void check_int8_planned(std::string_view op, const FlashAttnVarlenInt8Args& args,
                        const AttentionPlan& plan, Workspace workspace, const Executor& executor);

/// @pre check_int8_tensors passed.
AttentionPlan plan_int8(std::string_view op, const FlashAttnVarlenInt8Args& args, int num_workers,
                        std::optional<IsaLevel> isa);

/// @pre both checks passed.
cpu::AttentionProblem int8_problem(const FlashAttnVarlenInt8Args& args, const AttentionPlan& plan);

}  // namespace attend::ops
