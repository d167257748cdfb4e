// SPDX-License-Identifier: Apache-2.0
#include "serving/kv_memory.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

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

KvMemory::KvMemory(const Backend& backend, KvCacheSpec spec, int num_layers, KvLayout layout,
                   Executor& executor)
    : dtype_(spec.dtype) {
  spec.num_layers = 0;
  shape_ = backend.kv_cache_shape(spec);
  order_ = backend.kv_cache_stride_order(layout, /*include_layers=*/false, spec.format);
  layer_bytes_ = cache_bytes(shape_, dtype_);
  buffer_ = Buffer(static_cast<std::size_t>(layer_bytes_ * num_layers));

  // All ones is NaN in every floating-point format.
  auto* bytes = static_cast<std::byte*>(buffer_.data());
  const std::size_t size = buffer_.size();
  const auto workers = static_cast<std::size_t>(executor.num_workers());
  executor.run([&](int worker) {
    const auto w = static_cast<std::size_t>(worker);
    const std::size_t begin = size / workers * w;
    const std::size_t end = w + 1 == workers ? size : size / workers * (w + 1);
    std::memset(bytes + begin, 0xff, end - begin);
  });
}

TensorView KvMemory::layer(int index) const {
  if (buffer_.data() == nullptr) return {};
  auto* data = static_cast<std::byte*>(buffer_.data()) + layer_bytes_ * index;
  return cache_view(data, dtype_, shape_, order_);
}

}  // namespace attend::serving
