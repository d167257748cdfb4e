// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/batch/split.h"
#include "attend/dist/decode_context_parallel.h"
#include "attend/ops/sparse_mla.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/flashmla_sparse/indexer_steps.h"
#include "backends/flashmla_sparse/persistent_buffers.h"
#include "backends/flashmla_sparse/steps.h"

namespace attend::flashmla_sparse {

/// How the cached tokens of each request are spread over ranks.
struct ContextParallel {
  int world_size = 1, rank = 0, interleave = 1;
  DcpLayout layout() const noexcept { return {world_size, interleave}; }
  friend bool operator==(const ContextParallel&, const ContextParallel&) = default;
};

/// Where things lie in the workspace of a call, in bytes from its aligned start. All but the rows
/// is for as many tokens as a call attends to at a time.
struct WorkspaceLayout {
  std::size_t output = 0;   ///< [T, H, V] before it is quantised
  std::size_t queries = 0;  ///< [tokens, H, E]
  std::size_t latents = 0;  ///< [tokens, H, L]
  std::size_t slots = 0;    ///< i32 [tokens, topk]
  std::size_t counts = 0;   ///< i32 [tokens]
  std::size_t rows = 0;     ///< bf16 [rows of the largest gather, E]
  std::size_t plan = 0;     ///< of the largest plan
  std::size_t total = 0;    ///< with room to align the start
};

/// What the builder makes of one batch.
struct SparseMlaMetadata final : Metadata {
  int num_reqs = 0;
  int num_tokens = 0;
  DecodePrefillSplit split;  ///< decodes come first
  MlaDims dims;
  int num_heads = 0;  ///< of this rank
  int topk = 0;
  StoredKv stored;
  ContextParallel dcp;
  int num_workers = 1;
  int block_size = 0;
  ConstTensorView block_table;                ///< i32 [num_reqs, max_blocks], not owned
  std::vector<std::int64_t> slot_mapping;     ///< [num_tokens], or empty: nothing to write
  std::vector<std::int32_t> seq_lens;         ///< [num_reqs]
  std::vector<std::int32_t> query_start_loc;  ///< [num_reqs + 1]

  std::shared_ptr<PersistentBuffers> buffers;
  SparseBatch batch;
  std::vector<Step> steps;
  IndexerSteps indexer;
  /// Tokens that a call attends to at a time, so that its queries do not fill the memory.
  int tokens_at_once = 0;
  std::map<int, SparseMlaPlan> plans;  ///< by the number of tokens
  std::int32_t most_rows = 0;          ///< of a gather
  bool quant_output = false;           ///< the workspace has room for `output`
  WorkspaceLayout layout;

  std::size_t workspace_bytes() const noexcept override { return layout.total; }
  const SparseBatch* sparse_batch() const noexcept override { return &batch; }
};

}  // namespace attend::flashmla_sparse
