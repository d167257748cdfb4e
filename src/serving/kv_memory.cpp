// SPDX-License-Identifier: Apache-2.0
#include "serving/kv_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <numeric>
#include <utility>

#include "attend/core/error.h"

namespace attend::serving {
namespace {

constexpr std::int64_t kUnknown = std::numeric_limits<std::int64_t>::max();

/// A cgroup file that holds one number; kUnknown if it is missing or says "max".
std::int64_t read_limit(const char* path) {
  std::ifstream file(path);
  std::int64_t value = 0;
  return file >> value ? value : kUnknown;
}

std::int64_t meminfo_available() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  std::int64_t kib = 0;
  while (file >> key >> kib) {
    if (key == "MemAvailable:") return kib * 1024;
    std::getline(file, unit);
  }
  return kUnknown;
}

void add_problem(std::vector<std::string>& problems, const std::string& problem) {
  if (!problem.empty() && std::ranges::find(problems, problem) == problems.end())
    problems.push_back(problem);
}

}  // namespace

std::int64_t available_memory_bytes() {
  std::int64_t available = meminfo_available();
  const std::int64_t limit = read_limit("/sys/fs/cgroup/memory.max");
  if (limit != kUnknown) {
    const std::int64_t used = read_limit("/sys/fs/cgroup/memory.current");
    available =
        std::min(available, used == kUnknown ? limit : std::max<std::int64_t>(0, limit - used));
  }
  if (available == kUnknown) throw DeviceError("cannot find out how much memory is available");
  return available;
}

std::int64_t kv_layer_bytes(const Backend& backend, const KvCacheSpec& spec) {
  const auto scales = backend.kv_scale_shape(spec);
  return cache_bytes(backend.kv_cache_shape(spec), spec.dtype) +
         (scales.empty() ? 0 : cache_bytes(scales, DType::f32));
}

KvMemory::LayerTensors::LayerTensors(DType dtype, std::vector<std::int64_t> shape,
                                     std::vector<int> order, int num_layers, Executor& executor)
    : dtype_(dtype), shape_(std::move(shape)), order_(std::move(order)) {
  layer_bytes_ = cache_bytes(shape_, dtype_);
  CacheMemoryOptions options;
  options.executor = &executor;
  options.fill = 0xff;  // NaN in every floating-point format
  memory_ = CacheMemory(static_cast<std::size_t>(layer_bytes_ * num_layers), options);
}

TensorView KvMemory::LayerTensors::layer(int index) const {
  if (memory_.data() == nullptr) return {};
  auto* data = static_cast<std::byte*>(memory_.data()) + layer_bytes_ * index;
  return cache_view(data, dtype_, shape_, order_);
}

void MemoryUse::add(const CacheMemory& memory) {
  bytes += static_cast<std::int64_t>(memory.size());
  huge_page_bytes += static_cast<std::int64_t>(memory.huge_page_bytes());
  for (const NodeShare& share : memory.report().nodes) {
    const auto known = std::ranges::find(nodes, share.node, &NodeShare::node);
    if (known == nodes.end()) {
      nodes.push_back(share);
    } else {
      known->bytes += share.bytes;
    }
  }
  add_problem(problems, memory.report().huge_pages_problem);
  add_problem(problems, memory.report().nodes_problem);
}

void KvMemory::add_to(MemoryUse& use) const {
  use.add(caches_.memory());
  use.add(scales_.memory());
}

KvMemory::KvMemory(const Backend& backend, KvCacheSpec spec, int num_layers, KvLayout layout,
                   Executor& executor) {
  spec.num_layers = 0;
  caches_ =
      LayerTensors(spec.dtype, backend.kv_cache_shape(spec),
                   backend.kv_cache_stride_order(layout, /*include_layers=*/false, spec.format),
                   num_layers, executor);
  const std::vector<std::int64_t> scale_shape = backend.kv_scale_shape(spec);
  if (scale_shape.empty()) return;
  std::vector<int> contiguous(scale_shape.size());
  std::iota(contiguous.begin(), contiguous.end(), 0);
  scales_ = LayerTensors(DType::f32, scale_shape, std::move(contiguous), num_layers, executor);
}

}  // namespace attend::serving
