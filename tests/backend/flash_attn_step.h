// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/batch/split.h"
#include "support/host_tensor.h"
#include "support/random.h"

namespace attend::testing {

/// What one step of a FLASH_ATTN layer is made of.
struct StepOptions {
  std::vector<int> query_lens = {1, 5, 40};
  std::vector<int> context_lens = {70, 33, 0};  ///< computed tokens a request; all 0 for encoders
  /// Keys that all requests begin with, in the same blocks: whole blocks, <= all context_lens.
  int shared_keys = 0;
  std::vector<std::uint8_t> request_causal = {};
  bool causal = true;
  int num_q_heads = 4;
  int num_kv_heads = 2;
  int head_size = 16;
  DType dtype = DType::f32;
  AttentionType attn_type = AttentionType::decoder;
  std::vector<int> encoder_lens = {};  ///< encoder_decoder: keys a request
  /// encoder_decoder, a request: 1 = this step brings its keys, 0 = they are in the cache.
  std::vector<std::uint8_t> new_encoder = {};
  KvLayout layout = KvLayout::nhd;
  int num_layers = 0;  ///< > 0: the step works on the last layer of a cache with that many
  int block_size = 16;
  std::optional<int> sliding_window = std::nullopt;
  float softcap = 0.0F;
  std::vector<float> alibi_slopes = {};
  int padding = 3;  ///< poisoned rows behind the tokens, poisoned requests behind the requests
  int num_workers = 2;
  std::uint64_t seed = 7;
};

/// Query tokens [begin, end) of a request of the step.
struct StepPart {
  int request;
  int begin, end;
};

/// The tensors of a step, with a cache that holds the context and NaN everywhere else. Request r's
/// keys do not depend on layout, layers or block placement, so results can be compared by bits.
class Step {
 public:
  explicit Step(const StepOptions& options);

  StepOptions options;
  std::vector<int> seq_lens;
  std::vector<int> key_lens;  ///< keys a request: seq_lens, or encoder_lens
  CommonMetadata batch;
  BuilderConfig builder_config;
  ImplConfig impl_config;
  HostTensor block_table;
  HostTensor query, key, value, output, lse;  ///< with padding rows
  HostTensor cache_memory;                    ///< all layers
  TensorView cache;                           ///< this layer, [2, nb, bs, Hkv, D]
  std::unique_ptr<Executor> executor;
  Buffer workspace;

  int num_reqs() const noexcept { return static_cast<int>(seq_lens.size()); }
  bool is_cross() const noexcept { return options.attn_type == AttentionType::encoder_decoder; }
  bool is_encoder() const noexcept {
    return options.attn_type != AttentionType::decoder && !is_cross();
  }
  /// Of a request's keys those that this step brings begin here.
  int first_new_key(int request) const;
  ForwardArgs forward_args();
  std::unique_ptr<Metadata> build(int common_prefix_len = 0);
  /// Builds and runs.
  void run();
  /// Builds and runs a smaller decoder step of some tokens, gathered from this one's; scatters the
  /// rows back into output and lse. `changed_keys`: what is written instead of the own keys and
  /// values is noise of that seed (a draft that will be rejected). Returns the builder's split.
  DecodePrefillSplit run_parts(const std::vector<StepPart>& parts,
                               std::optional<std::uint64_t> changed_keys = std::nullopt);
  /// The slot of a request's token.
  std::int64_t slot(int request, int position) const;
  /// Compares output and LSE with the oracle on the requests' own keys, row by row, and checks that
  /// the padding rows still hold the poison.
  void expect_oracle() const;
  /// Compares the cache with the requests' keys and values; other slots must still hold the poison.
  void expect_cache() const;

 private:
  void fill_tokens();
  void fill_batch();
  void fill_cache();
  void expect_request(int request) const;
  void expect_poison_behind(const HostTensor& t) const;

  std::vector<HostTensor> keys_, values_;  ///< [seq_len, Hkv, D], one a request
};

}  // namespace attend::testing
