// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/plan/attention_plan.h"

namespace attend::plan {

/// Expected times of what a plan consists of, in microseconds of one worker.
struct UnitCost {
  double read_us;          ///< reading and packing the keys and values of a piece
  double row_us;           ///< products of one row with a piece
  double partial_us;       ///< storing a partial result and merging it later
  std::int64_t tile_rows;  ///< up to so many rows compute beside the reading

  /// Products of `rows` rows with a piece, beyond reading it.
  double products_us(std::int64_t rows) const noexcept;
};

/// For kernels of `isa` on keys and values of type `keys`, queries of a floating-point type.
UnitCost unit_cost(IsaLevel isa, DType keys, int head_dim_qk, int head_dim_v);

/// Expected times of a plan, all workers together.
struct PlanEstimate {
  double read_us = 0.0, products_us = 0.0, merge_us = 0.0;
};
PlanEstimate estimate(const AttentionPlan& plan, DType keys);

}  // namespace attend::plan
