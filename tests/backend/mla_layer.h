// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/ops/mla_weights.h"
#include "support/host_tensor.h"

namespace attend::testing {

/// How a layer of FLASH_ATTN_MLA is set up.
struct MlaSetup {
  MlaDims dims{64, 32, 16, 24};
  int heads = 3;
  DType dtype = DType::bf16;
  std::string kv_cache_dtype = "auto";
  int block_size = 16;
  int decode_threshold = 1;
  std::int64_t workspace_tokens = 0;
  bool short_extends_decode = true;
  bool quant_output = false;
  std::string prefill_backend = "auto";
  Platform platform;
};

/// Query tokens of one request in a step.
struct MlaStepRequest {
  int id = 0;        ///< rows of a request depend on it and the position alone
  int computed = 0;  ///< tokens that are in the cache
  int query = 0;
};

/// What an engine makes of a step before it calls a layer.
struct MlaStep {
  HostTensor block_table;
  CommonMetadata batch;
  std::unique_ptr<Metadata> metadata;
  ForwardArgs args;
};

/// One layer with its cache, driven as an engine does.
class MlaLayer {
 public:
  static constexpr int kMaxRequests = 6, kMaxTokens = 2048;

  MlaLayer(const MlaSetup& setup, Executor& executor);

  /// Bytes of the output and LSE of each (request, position).
  using Rows = std::map<std::pair<int, int>, std::vector<unsigned char>>;
  Rows run(const std::vector<MlaStepRequest>& step);

  BuilderConfig builder_config() const;
  ImplConfig impl_config() const;
  /// All that run() makes before it calls the layer.
  MlaStep prepare(const std::vector<MlaStepRequest>& step);
  /// A batch as run() makes it, without its block table.
  CommonMetadata batch(const std::vector<MlaStepRequest>& step) const;
  ForwardArgs args(const std::vector<MlaStepRequest>& step);

  MlaSetup setup;
  Executor& executor;
  HostTensor weight, cache, block_table;
  std::unique_ptr<HostTensor> query, kv_c, k_pe, output, lse;
  Buffer workspace;
  std::unique_ptr<MetadataBuilder> builder;
  std::unique_ptr<Impl> impl;

 private:
  KvCacheSpec spec() const;
};

}  // namespace attend::testing
