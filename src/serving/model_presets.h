// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "attend/backend/backend.h"

namespace attend::serving {

/// What chooses the tokens that a query attends to.
struct IndexerPreset {
  int num_heads = 0;  ///< of 128 elements
  int topk = 0;       ///< tokens chosen
};

/// Differential attention, variant v1.
struct DifferentialPreset {
  HeadPairing pairing = HeadPairing::interleaved;
  bool norm_weight = false;      ///< RMSNorm has a weight
  int layers_per_attention = 1;  ///< the last of so many layers of the model has attention
  /// Layers with attention that a shorter run leaves out, in front of the last with a cache.
  int skipped_layers = 0;
};

/// What attention needs to know about a model. Plain data: a new model is a new row.
struct ModelPreset {
  std::string_view name;
  std::string_view description;
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;    ///< MLA: of a cache row, mla->cache_dim()
  int num_layers = 0;  ///< with attention
  DType dtype = DType::bf16;
  std::optional<float> scale = std::nullopt;  ///< unset = 1 / sqrt(query_dim())
  float softcap = 0.0F;                       ///< 0 = off
  std::optional<int> sliding_window =
      std::nullopt;                ///< keys visible in windowed layers, own included
  int window_period = 1;           ///< layers repeat in groups of so many
  int windowed_layers_of_one = 1;  ///< of each group the first so many layers are windowed
  bool alibi = false;              ///< slopes: alibi_slopes(num_q_heads)
  bool alibi_sqrt = false;         ///< as AttentionParams::alibi_sqrt; only with `alibi`
  bool sinks = false;              ///< logits: sink_logits(num_q_heads)
  AttentionType attn_type = AttentionType::decoder;
  /// > 0: an encoder stands before the decoder. Every request has so many encoder tokens, and for
  /// each layer of the decoder there is one of encoder attention among them and one of cross
  /// attention to them.
  int encoder_tokens = 0;
  /// Set: multi-head latent attention of these sizes. num_kv_heads is then 1.
  std::optional<MlaDims> mla = std::nullopt;
  /// Set: sparse latent attention; `mla` is set, too.
  std::optional<IndexerPreset> indexer = std::nullopt;
  std::optional<DifferentialPreset> differential = std::nullopt;
  /// > 0: layers behind the first so many have no cache of their own. They attend to that of the
  /// last which has one, and compute only tokens whose logits are wanted.
  int caching_layers = 0;

  /// Elements of a head's query and output.
  int query_dim() const noexcept { return mla ? mla->qk_head_dim() : head_dim; }
  int output_dim() const noexcept { return mla ? mla->v_head_dim : head_dim; }
  bool is_encoder() const noexcept { return attn_type == AttentionType::encoder_only; }
  bool has_cross_attention() const noexcept { return encoder_tokens > 0; }
  /// Rows of results that a token has in a layer, and their elements: one a head, or one a pair.
  int num_rows() const noexcept { return differential ? num_q_heads / 2 : num_q_heads; }
  int row_dim() const noexcept { return differential ? 2 * head_dim : output_dim(); }
  /// The head of `heads` that is the first (branch 0) or second (1) of a pair. @pre `differential`.
  int head_of(int pair, int branch, int heads) const noexcept {
    return differential->pairing == HeadPairing::interleaved ? 2 * pair + branch
                                                             : pair + branch * heads / 2;
  }
  bool shares_caches() const noexcept { return caching_layers > 0; }
  bool shares_cache(int layer) const noexcept { return shares_caches() && layer >= caching_layers; }
  /// The decoder layer whose keys and values a decoder layer attends to.
  int cache_of(int layer) const noexcept {
    return shares_cache(layer) ? caching_layers - 1 : layer;
  }
  /// Caches of self attention in a run of `layers` decoder layers, and all of its caches.
  int num_self_caches(int layers) const noexcept {
    return shares_caches() ? (caching_layers - 1) * layers / num_layers + 1 : layers;
  }
  int num_caches(int layers) const noexcept {
    return is_encoder() ? 0 : has_cross_attention() ? 2 * layers : num_self_caches(layers);
  }
  /// Index among all layers of the model, those without attention included. @pre `differential`.
  int model_layer(int layer) const noexcept {
    const int skipped = layer < caching_layers - 1 ? 0 : differential->skipped_layers;
    return (layer + skipped + 1) * differential->layers_per_attention - 1;
  }
  /// Window of one decoder layer; unset = all keys.
  std::optional<int> window_of(int layer) const noexcept {
    return layer % window_period < windowed_layers_of_one ? sliding_window : std::nullopt;
  }
};

std::span<const ModelPreset> model_presets() noexcept;
/// @throws InvalidArgument listing the valid names.
const ModelPreset& find_model(std::string_view name);

/// The model with another number of query heads, for machines that the model is too large for: at
/// least 1, at most kMaxQueryHeads, and a multiple of its kv heads. @throws InvalidArgument.
ModelPreset with_query_heads(ModelPreset model, int num_q_heads);
inline constexpr int kMaxQueryHeads = 1024;

/// The model with another number of chosen tokens, at least 1, so that short requests have a choice
/// too. @throws InvalidArgument, also for a model without an indexer.
ModelPreset with_index_topk(ModelPreset model, int topk);

/// The model as a run of `num_layers` layers sees it. If layers share a cache, the run has those of
/// each kind in their proportion, the first ones of each, and always the last with a cache:
/// the run may then have no more layers than the model. Other models stay as they are.
/// @throws InvalidArgument.
ModelPreset with_layers(ModelPreset model, int num_layers);

/// Slopes of the ALiBi paper for any number of heads: a geometric sequence for the largest power of
/// two below, then every other element of the next finer sequence.
std::vector<float> alibi_slopes(int num_heads);

/// Stand-ins for the sink logits that a model learns: from -2 to 4 over the heads, so that some
/// heads hardly notice their sink and others give it most of the weight.
std::vector<float> sink_logits(int num_heads);

}  // namespace attend::serving
