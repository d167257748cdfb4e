// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attend/backend/backend.h"
#include "backends/differential/metadata.h"
#include "support/host_tensor.h"

namespace attend::testing {

/// What one step of a DIFFERENTIAL_FLASH_ATTN layer is made of.
struct DifferentialOptions {
  std::vector<int> query_lens = {1, 5, 40};
  std::vector<int> context_lens = {70, 33, 0};  ///< computed tokens a request
  int shared_keys = 0;  ///< keys that all requests begin with, in the same blocks: whole blocks
  std::vector<std::uint8_t> request_causal = {};
  int num_q_heads = 8;
  int num_kv_heads = 4;
  int head_size = 16;
  DType dtype = DType::f32;
  std::string kv_cache_dtype = "auto";
  DifferentialVariant variant = DifferentialVariant::v1;
  HeadPairing pairing = HeadPairing::interleaved;
  KvLayout layout = KvLayout::nhd;
  int num_layers = 0;  ///< > 0: the step works on the last layer of a cache with that many
  int block_size = 16;
  std::optional<int> sliding_window = std::nullopt;
  float softcap = 0.0F;
  std::vector<float> alibi_slopes = {}, sinks = {};
  int padding = 3;  ///< poisoned rows behind the tokens
  int num_workers = 2;
  std::uint64_t seed = 7;
};

/// Query tokens [begin, end) of a request of the step.
struct DifferentialPart {
  int request, begin, end;
};

/// The tensors of a step, with a cache that holds the context (unless its type is fp8) and NaN
/// everywhere else.
class DifferentialStep {
 public:
  explicit DifferentialStep(const DifferentialOptions& options);

  DifferentialOptions options;
  std::vector<int> seq_lens;
  CommonMetadata batch;
  BuilderConfig builder_config;
  ImplConfig impl_config;
  HostTensor block_table;
  HostTensor query, key, value, token_lambda, output, lse;  ///< with padding rows
  HostTensor cache_memory;                                  ///< all layers
  TensorView cache;                                         ///< this layer
  std::unique_ptr<Executor> executor;
  Buffer workspace;

  int num_reqs() const noexcept { return static_cast<int>(seq_lens.size()); }
  bool is_v1() const noexcept { return options.variant == DifferentialVariant::v1; }
  ForwardArgs forward_args();
  std::unique_ptr<Metadata> build(int common_prefix_len = 0);
  void forward(const Metadata& metadata);
  void run() { forward(*build()); }
  /// Runs a smaller step of some tokens, gathered from this one's; scatters the rows back.
  void run_parts(const std::vector<DifferentialPart>& parts);
  /// The slot of a request's token.
  std::int64_t slot(int request, int position) const;
  /// Row of the cache, [head_size]: plane 0 = keys, 1 = values, by the head of the model.
  TensorView cache_row(int plane, std::int64_t slot, int head) const;
  /// Compares output and LSE with the oracle on the requests' own rows, and with fp8 caches on what
  /// the cache holds; the padding rows must still hold the poison.
  void expect_oracle() const;
  /// The cache holds the requests' rows, rounded for fp8, and the poison in all other slots.
  void expect_cache() const;

 private:
  void fill_layer();
  void fill_tokens();
  void fill_batch();
  void fill_cache();
  bool is_fp8_cache() const noexcept { return is_fp8(builder_config.cache.dtype); }

  std::vector<HostTensor> keys_, values_;  ///< [seq_len, Hkv, D], one a request
};

const differential::DifferentialMetadata& as_differential(const Metadata& metadata);

}  // namespace attend::testing
