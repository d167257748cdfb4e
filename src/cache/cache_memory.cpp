// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/cache_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

#include "attend/core/error.h"
#include "attend/core/huge_pages.h"
#include "cache/first_touch.h"
#include "core/huge_mapping.h"

namespace attend {
namespace {

constexpr std::size_t kMaxBytes = SIZE_MAX / 4;

// Why a mapping has ordinary pages only; empty if it may have huge ones.
std::string why_ordinary_pages(std::size_t bytes, int advice_error) {
  if (bytes < kHugePageBytes) return fmt::format("smaller than {} bytes", kHugePageBytes);
  if (advice_error != 0) {
    return fmt::format("the kernel refused them: {}",
                       std::generic_category().message(advice_error));
  }
  // It takes the advice then too, and ignores it.
  if (huge_page_mode() == HugePageMode::never)
    return "transparent huge pages are switched off on this machine";
  return {};
}

std::vector<NodeShare> shares_of(std::span<const first_touch::Target> targets, std::size_t bytes) {
  std::vector<NodeShare> shares;
  for (std::size_t t = 0; t < targets.size(); ++t) {
    NodeShare share{targets[t].node, 0};
    const std::size_t step = targets.size() * kHugePageBytes;
    for (std::size_t at = t * kHugePageBytes; at < bytes; at += step)
      share.bytes += std::min(kHugePageBytes, bytes - at);
    shares.push_back(share);
  }
  return shares;
}

}  // namespace

CacheMemory::CacheMemory(std::size_t bytes, const CacheMemoryOptions& options)
    : CacheMemory() {  // complete from here on, so that what throws below gives the memory back
  if (bytes == 0) return;
  const bool huge = options.huge_pages && bytes >= kHugePageBytes;
  const HugeMapping mapping = bytes > kMaxBytes ? HugeMapping{} : map_huge_pages(bytes, huge);
  if (mapping.data == nullptr)
    throw DeviceError(fmt::format("cannot map {} bytes for a cache", bytes));
  data_ = mapping.data;
  size_ = bytes;
  if (options.huge_pages) {
    report_.huge_pages_problem = why_ordinary_pages(bytes, mapping.advice_error);
    report_.huge_pages_advised = report_.huge_pages_problem.empty();
  }
  Executor& executor = options.executor != nullptr ? *options.executor : default_executor();
  const NumaTopology& topology = options.topology != nullptr ? *options.topology : numa_topology();
  std::vector<first_touch::Target> targets;
  if (topology.nodes.size() > 1)
    targets = first_touch::choose_targets(topology, first_touch::worker_cpus(executor));
  report_.nodes = shares_of(targets, bytes);
  auto* const begin = static_cast<std::byte*>(data_);
  const auto touch = [&](std::size_t page) {
    const std::size_t at = page * kHugePageBytes;
    std::memset(begin + at, options.fill, std::min(kHugePageBytes, bytes - at));
  };
  const std::size_t num_pages = (bytes + kHugePageBytes - 1) / kHugePageBytes;
  report_.nodes_problem = first_touch::touch_pages(num_pages, targets, executor, touch);
}

CacheMemory::CacheMemory(CacheMemory&& o) noexcept
    : data_(std::exchange(o.data_, nullptr)),
      size_(std::exchange(o.size_, 0)),
      report_(std::exchange(o.report_, {})) {}

CacheMemory& CacheMemory::operator=(CacheMemory&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(size_, o.size_);
  std::swap(report_, o.report_);
  return *this;
}

CacheMemory::~CacheMemory() {
  if (data_ != nullptr) unmap_huge_pages(data_, size_);
}

std::size_t CacheMemory::huge_page_bytes() const {
  return data_ == nullptr ? 0 : std::min(size_, count_huge_page_bytes(data_, size_));
}

}  // namespace attend
