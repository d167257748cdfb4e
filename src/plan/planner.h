// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/plan/attention_plan.h"
#include "plan/visible_pieces.h"

/// How a plan is made, in steps that allocate nothing where the vectors have room. Input is valid.
namespace attend::plan {

/// Requests that attend to some pieces together. Partials lie piece by piece; all rows of a kv head
/// in a piece are consecutive, so that those of a request are found however rows are cut.
struct SharedPieces {
  std::int32_t request_begin, request_end;
  int outer;                ///< index of the shared pieces before these, or -1
  PieceRange pieces;        ///< [0, 0) if no row sees any
  std::int32_t end;         ///< piece at which the requests part
  std::int32_t merged = 0;  ///< leading pieces whose partials are stored as one
  std::int64_t slot = 0;    ///< of the first row
  std::int64_t rows = 0;    ///< of a kv head in a piece

  int partials() const { return (merged > 0 ? 1 : 0) + pieces.last - pieces.first - merged; }
};

/// Memory of the planning itself.
struct PlannerScratch {
  std::vector<WorkUnit> whole;
  std::vector<SharedPieces> shared;
  std::vector<int> innermost;
};

/// Lengths and masks of the requests.
void set_lengths(AttentionPlan& plan, const AttentionPlanInput& input);
/// All that does not depend on the requests.
void set_shape(AttentionPlan& plan, const AttentionPlanInput& input);
/// Units, reductions and how much they store.
void make_units(AttentionPlan& plan, PlannerScratch& scratch);

}  // namespace attend::plan
