// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "backend/mla_layer.h"

namespace attend::testing {

/// How a layer of FLASHMLA_SPARSE is set up.
struct SparseSetup {
  MlaDims dims{512, 16, 64, 24};
  int heads = 3;
  std::string kv_cache_dtype = "fp8_ds_mla";
  int topk = 48;
  SparseStrategy strategy = SparseStrategy::automatic;
  std::int64_t workspace_tokens = 0;
  bool quant_output = false;
  /// Rank of a group that the tokens are spread over.
  int world_size = 1, rank = 0, interleave = 1;
  int head_group = 0;  ///< other heads than those of another number
};

/// What the indexer chose for a token: as a rule `topk` tokens by chance, some of them twice, with
/// entries among them that name nothing.
std::vector<std::int32_t> random_choice(int id, int position, int topk);
/// All tokens that it sees, ascending.
std::vector<std::int32_t> whole_context(int id, int position, int topk);

struct SparseStep {
  HostTensor block_table;
  CommonMetadata batch;
  std::unique_ptr<Metadata> metadata;
  ForwardArgs args;
};

/// One layer with its cache, driven as an engine does.
class SparseLayer {
 public:
  static constexpr int kMaxRequests = 5, kMaxTokens = 1024, kBlockSize = 64;

  SparseLayer(const SparseSetup& setup, Executor& executor);

  MlaLayer::Rows run(const std::vector<MlaStepRequest>& step, Communicator* communicator = nullptr);
  BuilderConfig builder_config() const;
  ImplConfig impl_config() const;
  SparseStep prepare(const std::vector<MlaStepRequest>& step);
  CommonMetadata batch(const std::vector<MlaStepRequest>& step) const;
  ForwardArgs args(const std::vector<MlaStepRequest>& step);

  SparseSetup setup;
  Executor& executor;
  std::function<std::vector<std::int32_t>(int id, int position, int topk)> choose = random_choice;
  HostTensor weight, cache, block_table;
  std::unique_ptr<HostTensor> query, kv_c, k_pe, indices, output, lse;
  Buffer workspace;
  std::unique_ptr<MetadataBuilder> builder;
  std::unique_ptr<Impl> impl;

 private:
  KvCacheSpec spec() const;
};

}  // namespace attend::testing
