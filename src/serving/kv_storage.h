// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>

#include "attend/cache/kv_cache_spec.h"
#include "attend/cache/value_scales.h"
#include "serving/model_presets.h"

namespace attend::serving {

/// How the caches of a run hold keys and values.
struct KvStorage {
  DType dtype = DType::bf16;  ///< of the elements; i8 unless the format is plain
  KvFormat format = KvFormat::plain;
  /// int8_level1 only, null otherwise: scales of the values, layers numbered as in LayerGroup.
  const ValueScales* value_scales = nullptr;

  /// Name of the dtype or format.
  std::string_view name() const noexcept;
};

/// Storage of a kv_cache_dtype that a back end serves: "auto" (= compute), a dtype or a format.
KvStorage find_kv_storage(std::string_view kv_cache_dtype, DType compute) noexcept;

/// Takes the scales of a run of `num_layers` decoder layers; null = none, else they must outlive
/// `storage`. @throws InvalidArgument unless there are scales for int8_level1, and only for it, of
/// as many layers, KV heads and elements as the model's caches have.
void set_value_scales(KvStorage& storage, const ValueScales* scales, const ModelPreset& model,
                      int num_layers);

}  // namespace attend::serving
