// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/backend/backend.h"

namespace attend::serving {

/// Bytes of memory that new allocations may hope for: what the system reports as available, capped
/// by the control group's limit.
std::int64_t available_memory_bytes();

/// Bytes of one layer's cache, its scales included.
std::int64_t kv_layer_bytes(const Backend& backend, const KvCacheSpec& spec);

/// KV caches of all layers and their scales, each a region of its own in one allocation. Starts as
/// NaN, in caches of codes the scales, so that reading a slot that was never written shows.
class KvMemory {
 public:
  /// No cache at all: what encoders have.
  KvMemory() = default;
  /// `spec.num_layers` is ignored: every layer gets a cache of its own.
  KvMemory(const Backend& backend, KvCacheSpec spec, int num_layers, KvLayout layout,
           Executor& executor);

  /// Logical shape of Backend::kv_cache_shape(); undefined without a cache.
  TensorView layer(int index) const { return caches_.layer(index); }
  /// Shape of Backend::kv_scale_shape(); undefined if the cache has no scales.
  TensorView scales(int index) const { return scales_.layer(index); }

 private:
  /// One tensor a layer.
  class LayerTensors {
   public:
    LayerTensors() = default;
    LayerTensors(DType dtype, std::vector<std::int64_t> shape, std::vector<int> order,
                 int num_layers, Executor& executor);
    TensorView layer(int index) const;

   private:
    Buffer buffer_;
    DType dtype_ = DType::bf16;
    std::vector<std::int64_t> shape_;
    std::vector<int> order_;
    std::int64_t layer_bytes_ = 0;
  };
  LayerTensors caches_, scales_;
};

}  // namespace attend::serving
