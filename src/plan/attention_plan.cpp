// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/attention_plan.h"

#include "plan/plan_checks.h"
#include "plan/planner.h"
#include "plan/unit_layout.h"

namespace attend {

AttentionPlan plan_attention(const AttentionPlanInput& in) {
  plan::check_lengths(in);
  plan::check_shape(in);
  plan::check_shared_prefixes(in);
  AttentionPlan p;
  plan::set_shape(p, in);
  plan::set_lengths(p, in);
  p.shared_prefixes.assign(in.shared_prefixes.begin(), in.shared_prefixes.end());
  plan::PlannerScratch scratch;
  plan::make_units(p, scratch);
  p.workspace_bytes = plan::workspace_bytes(p);
  return p;
}

}  // namespace attend
