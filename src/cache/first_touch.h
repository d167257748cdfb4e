// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "attend/core/executor.h"
#include "attend/core/numa.h"

/// Who touches which page of new memory first, which decides on what node it lies.
namespace attend::first_touch {

/// A node that pages are put on, and the workers that can run there.
struct Target {
  int node = 0;              ///< NumaNode::id
  std::vector<int> workers;  ///< ascending
  std::vector<int> cpus;     ///< of the node
};

/// Nodes that have memory and a CPU in the mask of some worker, `worker_cpus[worker]`. Empty if
/// they are fewer than two: then there is nothing to choose.
std::vector<Target> choose_targets(const NumaTopology& topology,
                                   std::span<const std::vector<int>> worker_cpus);

/// Calls touch(page) once for each page in [0, num_pages), from all workers: page i on the
/// (i mod N)-th of N targets, or, without targets, page i by worker i * workers / num_pages.
/// Returns why some pages were not touched on their node; empty if all were.
std::string touch_pages(std::size_t num_pages, std::span<const Target> targets, Executor& executor,
                        FunctionRef<void(std::size_t page)> touch);

/// The affinity masks of an executor's workers; empty ones where the system does not say.
std::vector<std::vector<int>> worker_cpus(Executor& executor);

}  // namespace attend::first_touch
