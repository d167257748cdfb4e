// SPDX-License-Identifier: Apache-2.0
#include "serving/layer_group.h"

#include <algorithm>

#include "serving/differential_layer.h"
#include "serving/mla_layer.h"

namespace attend::serving {
namespace {

BuilderConfig builder_config(const LayerGroupConfig& c, const LayerKind& kind) {
  BuilderConfig b;
  b.num_q_heads = c.model.num_q_heads;
  b.cache = kind.type == AttentionType::encoder_decoder ? c.encoder_cache : c.cache;
  if (kind.type == AttentionType::encoder) {  // has no cache: only heads and their size matter
    b.cache.dtype = c.dtype;
    b.cache.format = KvFormat::plain;
  }
  if (kind.window) {
    b.window_left = *kind.window - 1;
    b.window_right = kind.type == AttentionType::encoder_only ? *kind.window - 1 : 0;
  }
  b.num_workers = c.num_workers;
  b.num_speculative_tokens = c.num_speculative_tokens;
  b.attn_type = kind.type;
  b.cascade = c.cascade;
  b.arithmetic = c.arithmetic;
  b.use_alibi = c.model.alibi;
  if (c.model.mla) {
    MlaBuilderConfig& mla = b.mla.emplace();
    mla.dims = *c.model.mla;
    mla.dtype = c.dtype;
    mla.max_model_len = c.max_model_len;
    mla.max_num_seqs = c.max_num_seqs;
    if (c.model.indexer) {
      SparseBuilderConfig& sparse = b.sparse.emplace();
      sparse.topk = c.model.indexer->topk;
      sparse.max_num_batched_tokens = c.max_num_batched_tokens;
    }
  }
  if (c.model.differential) b.differential.emplace();
  return b;
}

ImplConfig impl_config(const LayerGroupConfig& c, const LayerKind& kind, int layer) {
  const ModelPreset& m = c.model;
  ImplConfig i;
  i.num_q_heads = m.num_q_heads;
  i.num_kv_heads = m.num_kv_heads;
  i.head_size = m.head_dim;
  i.scale = m.scale;
  i.softcap = m.softcap;
  i.sliding_window = kind.window;
  if (m.alibi) i.alibi_slopes = alibi_slopes(m.num_q_heads);
  i.use_alibi_sqrt = m.alibi_sqrt;
  if (m.sinks) i.sinks = sink_logits(m.num_q_heads);
  i.attn_type = kind.type;
  i.dtype = c.dtype;
  if (kind.type == AttentionType::encoder) return i;  // has no cache
  i.kv_cache_dtype = c.kv_cache_dtype;
  i.shares_kv_cache = kind.shares_cache;
  if (c.value_scales != nullptr) {
    const ConstTensorView scales = c.value_scales->layer(layer);
    i.value_scales.assign(scales.as<float>(), scales.as<float>() + scales.numel());
  }
  if (m.mla) {
    Executor& executor = c.executor != nullptr ? *c.executor : default_executor();
    i.mla.emplace().weights = make_mla_weights(m, layer, *c.generator, executor);
  }
  if (m.differential) i.differential = make_differential_layer(m, layer, *c.generator);
  return i;
}

LayerGroup make_group(const LayerGroupConfig& config, const LayerKind& kind) {
  LayerGroup group;
  group.kind = kind;
  group.builder = config.backend.make_builder(builder_config(config, kind));
  return group;
}

}  // namespace

std::vector<AttentionType> attention_types(const ModelPreset& model) {
  if (!model.has_cross_attention()) return {model.attn_type};
  return {AttentionType::encoder, model.attn_type, AttentionType::encoder_decoder};
}

std::vector<LayerGroup> make_layer_groups(const LayerGroupConfig& config) {
  std::vector<LayerGroup> groups;
  for (const AttentionType type : attention_types(config.model)) {
    const int first = type == AttentionType::encoder           ? 2 * config.num_layers
                      : type == AttentionType::encoder_decoder ? config.num_layers
                                                               : 0;
    for (int layer = 0; layer < config.num_layers; ++layer) {
      LayerKind kind{type};
      if (type == config.model.attn_type) {
        kind.window = config.model.window_of(layer);
        kind.shares_cache = config.model.shares_cache(layer);
      }
      auto group = std::find_if(groups.begin(), groups.end(),
                                [&](const LayerGroup& g) { return g.kind == kind; });
      if (group == groups.end()) {
        group = groups.insert(groups.end(), make_group(config, kind));
      }
      group->layers.push_back(first + layer);
      group->impls.push_back(config.backend.make_impl(impl_config(config, kind, first + layer)));
    }
  }
  return groups;
}

}  // namespace attend::serving
