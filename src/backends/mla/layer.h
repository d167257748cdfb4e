// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>

#include "attend/backend/backend.h"
#include "attend/backend/mla_prefill.h"
#include "attend/ops/mla_weights.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/mla/metadata.h"

namespace attend::mla {

/// Constants of one layer, checked.
struct Layer {
  ImplConfig config;
  StoredKv stored;
  float scale = 1.0F;     ///< of logits
  float kv_scale = 1.0F;  ///< of an fp8 cache
  const MlaPrefillBackend* prefill_backend = nullptr;
  std::unique_ptr<const MlaPrefill> prefill;

  const MlaWeights& weights() const noexcept { return *config.mla->weights; }
  const MlaDims& dims() const noexcept { return weights().dims(); }
};

/// Checks the tensors of a call against the batch, reading what the block table says. Writes
/// nothing. @throws InvalidArgument; Unsupported for an output that cannot be quantised.
void check_forward(const Layer& layer, const ForwardArgs& args, const MlaMetadata& m,
                   const Executor& executor);
/// What is written whatever the metadata says.
void check_results(const Layer& layer, const ForwardArgs& args);

/// Writes the new rows into the cache, then attends. @pre check_forward().
void run_forward(const Layer& layer, const ForwardArgs& args, const MlaMetadata& m,
                 Executor& executor);

}  // namespace attend::mla
