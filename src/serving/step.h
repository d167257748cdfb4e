// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "attend/batch/common_metadata.h"
#include "attend/core/executor.h"
#include "attend/core/workspace.h"
#include "serving/content.h"
#include "serving/model_presets.h"
#include "serving/scheduler.h"

/// From a scheduled batch to what a back end is called with.
namespace attend::serving {

/// A batch's metadata together with the block table that it points to.
struct StepMetadata {
  CommonMetadata common;
  std::vector<std::int32_t> block_table;  ///< [B, longest request's blocks]
  int common_prefix_len = 0;  ///< computed tokens in blocks that all requests begin with
};

/// `block_size` 0 = encoder: no blocks, no slots, every token sees the whole prompt.
StepMetadata make_step_metadata(const RequestBatch& batch, int block_size);

/// The encoder's share of a step: the requests that are new, each with all its encoder tokens.
RequestBatch make_encoder_batch(const RequestBatch& batch, int encoder_tokens);
/// Cross attention of the same queries as `decoder`, the step's own metadata, to the encoder tokens
/// of their requests; new requests bring these as key rows, in the order of the batch.
StepMetadata make_cross_metadata(const StepMetadata& decoder, const RequestBatch& batch,
                                 int encoder_tokens, int block_size);

/// The step for layers without a cache of their own, which compute only tokens whose logits are
/// wanted. Points to the block table of `step`.
StepMetadata make_sharing_metadata(const StepMetadata& step);

/// One query token of a step.
struct StepToken {
  const Request* request = nullptr;
  std::uint64_t own_content = 0;  ///< of the query
  std::uint64_t content = 0;      ///< of key and value: shared with other requests if the token is
  std::int64_t position = 0;
  std::int64_t num_keys = 0;        ///< keys of the request in this step
  std::int64_t first_rejected = 0;  ///< as ScheduledRequest::first_rejected()
  bool mla_decode = false;          ///< MLA: takes the decode path, mark_mla_decodes()
};
std::vector<StepToken> make_step_tokens(const RequestBatch& batch);
/// Sets StepToken::mla_decode as MLA back ends divide the batch that the tokens are of: those of
/// its first requests that have computed tokens and no more than `decode_threshold` new ones.
void mark_mla_decodes(const CommonMetadata& batch, int decode_threshold,
                      std::vector<StepToken>& tokens);
/// The tokens of make_sharing_metadata(), out of all of a step.
std::vector<StepToken> make_sharing_tokens(const CommonMetadata& step,
                                           const std::vector<StepToken>& tokens);
/// The tokens of an encoder batch.
std::vector<StepToken> make_encoder_tokens(const RequestBatch& encoder_batch);

/// Inputs and outputs of one layer's call, reused by all layers and steps.
class StepTensors {
 public:
  StepTensors(const ModelPreset& model, DType dtype);
  /// Makes room and generates the queries of some tokens and the keys and values of others (in self
  /// attention the same ones) in a layer; poisons output and LSE with NaN, so that a row which the
  /// kernel forgets shows.
  void fill(std::span<const StepToken> queries, std::span<const StepToken> keys, int layer,
            const ValueGenerator& generator, Executor& executor);

  ConstTensorView query() const;  ///< [T, Hq, query_dim()]
  /// [T, Hkv, D] each; of MLA undefined.
  ConstTensorView key() const;
  ConstTensorView value() const;
  /// MLA: [T, L] and [T, R]; else undefined.
  ConstTensorView kv_c() const;
  ConstTensorView k_pe() const;
  TensorView output() const;  ///< [T, Hq, output_dim()]
  TensorView lse() const;
  /// Output row as float32 values, of a head or a pair as ModelPreset::num_rows() says.
  std::vector<float> output_row(int token, int row) const;
  float lse_value(int token, int head) const;

 private:
  void resize(std::size_t num_queries, std::size_t num_keys);
  TensorView view(const Buffer& buffer, int rows, int heads, int dim) const;
  std::size_t row_bytes(int dim) const;

  const ModelPreset& model_;
  DType dtype_;
  int key_dim_, value_dim_;  // MLA: a latent is a key, a rotated key a value
  int num_queries_ = 0, num_keys_ = 0;
  Buffer query_, key_, value_, output_, lse_;
};

/// What sets the layers of a model apart.
struct LayerKind {
  AttentionType type = AttentionType::decoder;
  std::optional<int> window = std::nullopt;  ///< keys visible, own included; unset = all
  bool shares_cache = false;  ///< has none of its own, and sees make_sharing_metadata()
  friend bool operator==(const LayerKind&, const LayerKind&) = default;
};

/// Useful work of a step in one layer.
struct StepWork {
  /// 2 per multiply-add of q.k and p.v over visible pairs only, of tokens that a layer computes.
  /// Differential attention: with values as wide as two heads. MLA: of the compute-friendly form,
  /// in which every key and value is also made once from its latent. Sparse MLA: of the absorbed
  /// form over chosen tokens, and of the indexer's logits.
  double prefill_flops = 0;
  /// Keys and values that decode requests read, with their scales; of sparse MLA the chosen rows,
  /// and the indexer's keys.
  double decode_bytes = 0;
};
/// `batch` is an encoder batch for encoder attention. `kv_token_bytes`: what the cache holds of a
/// token in one layer.
StepWork measure_work(const RequestBatch& batch, const ModelPreset& model,
                      std::int64_t kv_token_bytes, const LayerKind& layer);

}  // namespace attend::serving
