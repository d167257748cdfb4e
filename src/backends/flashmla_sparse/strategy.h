// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/backend/sparse.h"
#include "attend/batch/split.h"
#include "backends/flashmla_sparse/steps.h"

namespace attend::flashmla_sparse {

/// What a decision is made from.
struct StrategyInput {
  SparseStrategy asked = SparseStrategy::automatic;
  bool has_codes = false;  ///< the cache is fp8_ds_mla
  int dcp_world_size = 1;
  int topk = 0;
  int first_prefill = 0;  ///< request
  std::int64_t workspace_rows = 0;
  int num_workers = 1;
};

SparseDecision decide(const StrategyInput& input, const Requests& requests);

}  // namespace attend::flashmla_sparse
