// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/backend/mla_prefill.h"
#include "attend/batch/split.h"
#include "attend/plan/attention_plan.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/mla/prefill_steps.h"

namespace attend::mla {

/// Where things lie in the workspace of a call, in bytes from its aligned start. The decode and the
/// prefill of a batch follow each other, so both begin at `parts`.
struct WorkspaceLayout {
  std::size_t output = 0;  ///< [T, H, V] before it is quantised
  std::size_t parts = 0;
  // Decode.
  std::size_t queries = 0;  ///< [decode tokens, H, E]
  std::size_t latents = 0;  ///< [decode tokens, H, L]
  std::size_t decode = 0;   ///< of the plan
  // Prefill.
  std::size_t rows = 0;     ///< [max_keys, E]
  std::size_t keys = 0;     ///< [max_keys, H, P + R]
  std::size_t values = 0;   ///< [max_keys, H, V]
  std::size_t state = 0;    ///< f32 [carried_tokens, H, head_dim_v + 2]
  std::size_t prefill = 0;  ///< of the steps' plans and the prefill back end
  std::size_t total = 0;    ///< with room to align the start
};

/// What the builder makes of one batch.
struct MlaMetadata final : Metadata {
  int num_reqs = 0;
  int num_tokens = 0;
  DecodePrefillSplit split;  ///< decodes come first
  MlaDims dims;
  int num_heads = 0;
  DType dtype = DType::bf16;  ///< of the layers
  StoredKv stored;            ///< in the cache
  const MlaPrefillBackend* prefill_backend = nullptr;
  int block_size = 0;
  ConstTensorView block_table;             ///< i32 [num_reqs, max_blocks], not owned
  std::vector<std::int64_t> slot_mapping;  ///< [num_tokens], or empty: nothing to write
  std::vector<std::int32_t> seq_lens;      ///< [num_reqs]

  AttentionPlan decode;                    ///< of the first split.num_decodes requests
  std::vector<PrefillStep> prefill_steps;  ///< chunks of contexts, then the rests
  std::int64_t max_keys = 0;               ///< of a prefill step
  std::int64_t carried_tokens = 0;         ///< prefill tokens up to the last one with a state
  bool quant_output = false;               ///< the workspace has room for `output`
  WorkspaceLayout layout;

  std::size_t workspace_bytes() const noexcept override { return layout.total; }
};

}  // namespace attend::mla
