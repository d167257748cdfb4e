// SPDX-License-Identifier: Apache-2.0
#include "cache/first_touch.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <iterator>
#include <optional>

#include "core/affinity.h"

namespace attend::first_touch {
namespace {

std::vector<int> common(std::span<const int> a, std::span<const int> b) {
  std::vector<int> both;
  std::ranges::set_intersection(a, b, std::back_inserter(both));
  return both;
}

/// Keeps the calling thread on some CPUs.
class OnCpus {
 public:
  /// `own` is the mask of the thread.
  OnCpus(std::span<const int> own, std::span<const int> wanted) : own_(own) {
    const std::vector<int> both = common(own, wanted);
    if (both.size() == own.size()) {
      there_ = !own.empty();
    } else {
      there_ = moved_ = set_thread_cpus(both);
    }
  }
  OnCpus(const OnCpus&) = delete;
  OnCpus& operator=(const OnCpus&) = delete;
  ~OnCpus() {
    if (moved_) set_thread_cpus(own_);
  }
  bool there() const { return there_; }

 private:
  std::span<const int> own_;
  bool there_ = false, moved_ = false;
};

/// Part `part` of `parts` of a node's pages; false if they were touched from elsewhere.
bool touch_target(std::size_t num_pages, std::span<const Target> targets, std::size_t t, int worker,
                  FunctionRef<void(std::size_t page)> touch) {
  const Target& target = targets[t];
  const auto mine = std::ranges::find(target.workers, worker);
  if (mine == target.workers.end()) return true;
  std::vector<int> own;
  std::optional<OnCpus> here;
  try {
    own = thread_cpus();
    here.emplace(own, target.cpus);
  } catch (const std::exception&) {  // no memory to find out how: the pages lie where they fall
  }
  const auto part = static_cast<std::size_t>(mine - target.workers.begin());
  const std::size_t step = targets.size() * target.workers.size();
  for (std::size_t page = t + part * targets.size(); page < num_pages; page += step) touch(page);
  return here && here->there();
}

}  // namespace

std::vector<std::vector<int>> worker_cpus(Executor& executor) {
  std::vector<std::vector<int>> all(static_cast<std::size_t>(executor.num_workers()));
  executor.run([&](int worker) {
    try {
      all[static_cast<std::size_t>(worker)] = thread_cpus();
    } catch (const std::exception&) {  // no memory: nothing is known of this worker
    }
  });
  return all;
}

std::vector<Target> choose_targets(const NumaTopology& topology,
                                   std::span<const std::vector<int>> worker_cpus) {
  std::vector<Target> targets;
  for (const NumaNode& node : topology.nodes) {
    if (node.memory_bytes == 0) continue;
    Target target{node.id, {}, node.cpus};
    for (std::size_t w = 0; w < worker_cpus.size(); ++w)
      if (!common(worker_cpus[w], node.cpus).empty()) target.workers.push_back(static_cast<int>(w));
    if (!target.workers.empty()) targets.push_back(std::move(target));
  }
  if (targets.size() < 2) targets.clear();
  return targets;
}

std::string touch_pages(std::size_t num_pages, std::span<const Target> targets, Executor& executor,
                        FunctionRef<void(std::size_t page)> touch) {
  const auto workers = static_cast<std::size_t>(executor.num_workers());
  std::atomic<int> elsewhere{0};
  executor.run([&](int worker) {
    const auto w = static_cast<std::size_t>(worker);
    if (targets.empty()) {
      for (std::size_t page = num_pages * w / workers; page < num_pages * (w + 1) / workers; ++page)
        touch(page);
    }
    // Workers begin with different nodes, so that all memory is busy.
    for (std::size_t i = 0; i < targets.size(); ++i)
      if (!touch_target(num_pages, targets, (i + w) % targets.size(), worker, touch)) ++elsewhere;
  });
  if (elsewhere == 0) return {};
  return fmt::format("{} times a worker could not move to the CPUs of a node", elsewhere.load());
}

}  // namespace attend::first_touch
