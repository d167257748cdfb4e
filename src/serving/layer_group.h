// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/cache/value_scales.h"
#include "serving/content.h"
#include "serving/model_presets.h"
#include "serving/step.h"

namespace attend::serving {

/// Layers of one kind, which therefore share a builder and the metadata of a step.
///
/// Layers are numbered through: with N decoder layers those of self attention are 0 .. N - 1, of
/// cross attention N .. 2N - 1, of the encoder 2N .. 3N - 1. A number is part of what values a
/// layer has.
struct LayerGroup {
  LayerKind kind;
  std::vector<int> layers;
  std::unique_ptr<MetadataBuilder> builder;
  std::vector<std::unique_ptr<Impl>> impls;  ///< one a layer, as `layers`
  std::unique_ptr<Metadata> metadata;        ///< of the current step; null if it has nothing to do
};

struct LayerGroupConfig {
  const ModelPreset& model;
  const Backend& backend;
  int num_layers = 1;  ///< of the decoder
  DType dtype = DType::bf16;
  std::string kv_cache_dtype = "auto";
  const ValueScales* value_scales = nullptr;  ///< as KvStorage::value_scales
  KvCacheSpec cache = {};                     ///< of self attention
  KvCacheSpec encoder_cache = {};             ///< of cross attention; of no use without it
  int num_workers = 1;
  int num_speculative_tokens = 0;
  CascadeMode cascade = CascadeMode::automatic;
  Arithmetic arithmetic = Arithmetic::automatic;
  const ValueGenerator* generator = nullptr;  ///< of weights: MLA and differential, needed there
  // MLA only, and needed there.
  Executor* executor = nullptr;    ///< null = default_executor()
  std::int64_t max_model_len = 0;  ///< as MlaBuilderConfig::max_model_len
  int max_num_seqs = 0;            ///< as MlaBuilderConfig::max_num_seqs
  int max_num_batched_tokens = 0;  ///< as SparseBuilderConfig's, of sparse models only
};

/// Groups in the order in which a step runs them: encoder, self attention, cross attention.
std::vector<LayerGroup> make_layer_groups(const LayerGroupConfig& config);

/// Types of attention that a model's layers have.
std::vector<AttentionType> attention_types(const ModelPreset& model);

}  // namespace attend::serving
