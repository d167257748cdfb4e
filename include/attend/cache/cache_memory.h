// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "attend/core/executor.h"
#include "attend/core/numa.h"

namespace attend {

/// How a CacheMemory is made.
struct CacheMemoryOptions {
  Executor* executor = nullptr;            ///< whose workers touch it; null = default_executor()
  unsigned char fill = 0;                  ///< first value of every byte
  bool huge_pages = true;                  ///< ask for huge pages
  const NumaTopology* topology = nullptr;  ///< null = numa_topology()
};

/// Bytes of a CacheMemory that were put on one node.
struct NodeShare {
  int node = 0;  ///< NumaNode::id
  std::size_t bytes = 0;
};

/// What became of a CacheMemory. The memory works in every case.
struct CacheMemoryReport {
  /// The kernel was asked for huge pages and may give them; CacheMemory::huge_page_bytes() says how
  /// many it gave.
  bool huge_pages_advised = false;
  std::string huge_pages_problem;  ///< why it was not; empty if it was, or was not to be
  /// Ascending by node; empty if no node was chosen, since there is one only or nothing is known of
  /// them: then pages lie where the worker ran that touched them.
  std::vector<NodeShare> nodes;
  std::string
      nodes_problem;  ///< why pages may lie elsewhere than `nodes` says; empty if they do not
};

/// Owner of the memory of KV caches: a mapping of its own, aligned to kHugePageBytes, in huge pages
/// where the kernel gives them. The workers of an executor touch all of it at once while it is
/// made, so that no page is made while a batch is served.
///
/// Workers take the units of a plan as they come, so that no worker owns a part of a cache. On
/// several nodes huge page i therefore lies on the (i mod N)-th of the N nodes that have memory and
/// a CPU that some worker may run on: any blocks are read from all nodes evenly. For that each
/// worker moves to the CPUs of a node while it touches its pages there, as far as its affinity mask
/// lets it, and has its mask back afterwards. A memory policy that the process was started under
/// (numactl) goes before this rule.
class CacheMemory {
 public:
  /// No memory.
  CacheMemory() = default;
  /// @throws DeviceError if the memory cannot be had.
  explicit CacheMemory(std::size_t bytes, const CacheMemoryOptions& options = {});
  CacheMemory(CacheMemory&& o) noexcept;
  CacheMemory& operator=(CacheMemory&& o) noexcept;
  CacheMemory(const CacheMemory&) = delete;
  CacheMemory& operator=(const CacheMemory&) = delete;
  ~CacheMemory();

  /// Null if size() is 0.
  void* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  const CacheMemoryReport& report() const noexcept { return report_; }
  /// Bytes that lie in huge pages now, at most size(): count_huge_page_bytes(), which takes
  /// milliseconds.
  std::size_t huge_page_bytes() const;

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
  CacheMemoryReport report_;
};

}  // namespace attend
