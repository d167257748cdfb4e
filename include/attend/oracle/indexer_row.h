// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "attend/core/dtype.h"
#include "attend/oracle/indexer.h"

/// float64 reference of a whole indexer: from projections to logits, one query token at a time.
namespace attend::oracle {

/// One query token, from functions that give the values: needs no cache. No Hadamard transform,
/// scales are powers of two.
struct IndexerRowProblem {
  int num_heads = 0;
  DType dtype = DType::bf16;   ///< of the projections
  std::int64_t position = 0;   ///< of the query, which sees the keys 0 .. position
  std::vector<float> q;        ///< [H, 128]
  std::vector<float> weights;  ///< [H]
  std::vector<float> k_norm_weight, k_norm_bias;  ///< [128]
  bool is_neox = true;
  std::function<std::vector<float>(std::int64_t j)> key;  ///< 128 values, before the norm
  std::function<std::vector<float>(std::int64_t position)> cos_sin;  ///< 64 values
};

/// Logits of the keys 0 .. position. The bounds have the codes of keys in them that may be others,
/// as a result of the norm lies near the middle of two numbers.
IndexerLogits indexer_row(const IndexerRowProblem& p);

}  // namespace attend::oracle
