// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>

#include "attend/plan/attention_plan.h"

/// Validation of what a plan is made for. Allocates nothing if the input is good, shared prefixes
/// apart. @throws InvalidArgument.
namespace attend::plan {

void check_lengths(const AttentionPlanInput& input);
void check_shape(const AttentionPlanInput& input);
/// @pre check_lengths.
void check_shared_prefixes(const AttentionPlanInput& input);
/// The level to plan for. @throws Unsupported if the machine does not have it.
IsaLevel checked_isa(std::optional<IsaLevel> wanted);

}  // namespace attend::plan
