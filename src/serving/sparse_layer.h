// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "attend/backend/sparse_indexer.h"
#include "attend/cache/cache_memory.h"
#include "serving/content.h"
#include "serving/kv_memory.h"
#include "serving/model_presets.h"
#include "serving/step.h"

/// The indexers of models with sparse latent attention.
namespace attend::serving {

/// Cosines and sines by which the indexer rotates a token, 32 each.
void fill_index_rope(std::int64_t position, float* row);

/// What a run's indexers have besides the model: all layers see the same batch.
struct IndexerMemory {
  std::int64_t num_blocks = 0;
  int block_size = 0;
  int num_layers = 1;
  std::int64_t max_model_len = 0;
};

/// Bytes that the cache of one layer's indexer takes for a block.
std::int64_t index_block_bytes(int block_size) noexcept;

/// The indexers of all layers, which are the same but for their caches and inputs.
class SparseLayers {
 public:
  /// @pre model.indexer is set.
  SparseLayers(const ModelPreset& model, DType dtype, const IndexerMemory& memory,
               Executor& executor);

  /// Generates the projections of the step's tokens in a layer.
  void fill(std::span<const StepToken> tokens, int layer, const ValueGenerator& generator,
            Executor& executor);
  /// Chooses, and gives what was chosen: [T, topk]. @pre fill() with the tokens of the metadata.
  ConstTensorView choose(int layer, const Metadata& metadata, Executor& executor);
  /// What was chosen for a token.
  std::vector<std::int32_t> chosen_row(std::int64_t token) const;
  void add_to(MemoryUse& use) const { use.add(cache_); }

 private:
  const ModelPreset& model_;
  DType dtype_;
  IndexerMemory memory_;
  Buffer rope_, q_, k_, weights_, positions_, chosen_, workspace_;
  CacheMemory cache_;
  std::unique_ptr<SparseIndexer> indexer_;
  std::int64_t num_tokens_ = 0;
};

}  // namespace attend::serving
