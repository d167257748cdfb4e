// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/cache/cache_memory.h"

namespace attend::serving {

/// Bytes of memory that new allocations may hope for: what the system reports as available, capped
/// by the control group's limit.
std::int64_t available_memory_bytes();

/// Bytes of one layer's cache, its scales included.
std::int64_t kv_layer_bytes(const Backend& backend, const KvCacheSpec& spec);

/// Where caches lie.
struct MemoryUse {
  std::int64_t bytes = 0;
  std::int64_t huge_page_bytes = 0;   ///< of them in huge pages
  std::vector<NodeShare> nodes;       ///< as CacheMemoryReport::nodes, added up
  std::vector<std::string> problems;  ///< why there is no more in huge pages or on their nodes

  void add(const CacheMemory& memory);
};

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
  /// Adds the caches and the scales to `use`.
  void add_to(MemoryUse& use) const;

 private:
  /// One tensor a layer.
  class LayerTensors {
   public:
    LayerTensors() = default;
    LayerTensors(DType dtype, std::vector<std::int64_t> shape, std::vector<int> order,
                 int num_layers, Executor& executor);
    TensorView layer(int index) const;
    const CacheMemory& memory() const { return memory_; }

   private:
    CacheMemory memory_;
    DType dtype_ = DType::bf16;
    std::vector<std::int64_t> shape_;
    std::vector<int> order_;
    std::int64_t layer_bytes_ = 0;
  };
  LayerTensors caches_, scales_;
};

}  // namespace attend::serving
