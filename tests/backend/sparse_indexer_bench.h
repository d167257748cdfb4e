// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "attend/backend/sparse_indexer.h"
#include "backend/sparse_layer.h"

namespace attend::testing {

/// An indexer with its cache beside a layer, which makes batches and metadata.
class IndexerBench {
 public:
  static constexpr int kHeads = 4, kTopk = 20;

  struct Budgets {
    std::int64_t keys = 0, logits_bytes = std::int64_t{1} << 28;
  };

  /// A rank, if the setup names one: its caches hold the tokens of that rank only.
  IndexerBench(Executor& run_on, const Budgets& budgets, const SparseSetup& setup = one_rank());

  /// What is chosen for each (request, position).
  using Rows = std::map<std::pair<int, int>, std::vector<std::int32_t>>;
  Rows run(const std::vector<MlaStepRequest>& requests, Communicator* communicator = nullptr);
  SparseIndexerArgs args(const std::vector<MlaStepRequest>& requests, const Metadata& metadata);

  static SparseSetup one_rank();

  Executor& executor;
  SparseLayer layer;
  bool equal_keys = false;  ///< many tokens of a request have the same key, and so the same logits
  HostTensor cos_sin, cache;
  std::unique_ptr<HostTensor> q, k, weights, positions, chosen;
  Buffer workspace;
  SparseIndexer indexer;

 private:
  SparseIndexerConfig make_config();
};

}  // namespace attend::testing
