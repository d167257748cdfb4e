// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/backend/backend.h"
#include "attend/ops/mla_weights.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/flashmla_sparse/metadata.h"

namespace attend::flashmla_sparse {

inline constexpr std::string_view kForwardOp = "FLASHMLA_SPARSE.forward";

/// Constants of one layer, checked.
struct Layer {
  ImplConfig config;
  StoredKv stored;
  float scale = 1.0F;  ///< of logits

  const MlaWeights& weights() const noexcept { return *config.mla->weights; }
  const MlaDims& dims() const noexcept { return weights().dims(); }
};

/// What is written whatever the metadata says.
void check_results(const Layer& layer, const ForwardArgs& args);
/// Checks the tensors of a call against the batch, reading what the block table says of the keys
/// that are there. Writes nothing. @throws InvalidArgument.
void check_forward(const Layer& layer, const ForwardArgs& args, const SparseMlaMetadata& m,
                   const Executor& executor);

/// Writes the new rows into the cache, then attends. @pre check_forward().
void run_forward(const Layer& layer, const ForwardArgs& args, const SparseMlaMetadata& m,
                 Executor& executor);

}  // namespace attend::flashmla_sparse
