// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace attend {

/// One memory node of the machine.
struct NumaNode {
  int id = 0;                     ///< number that Linux gives it; numbers may have gaps
  std::vector<int> cpus;          ///< ascending; empty for memory without CPUs
  std::int64_t memory_bytes = 0;  ///< 0 for CPUs without memory
};

/// Which CPUs are near to which memory.
struct NumaTopology {
  std::vector<NumaNode> nodes;  ///< ascending by id; empty if nothing trustworthy is known
  std::string problem;          ///< why nodes is empty, in words; empty if it is not
};

/// Reads the folders node<N> of `root`, a copy of /sys/devices/system/node. Their text is not
/// trusted: one node that cannot be understood, or a CPU of two nodes, and nothing is known.
NumaTopology read_numa_topology(const std::filesystem::path& root);

/// The topology of this machine, read once.
const NumaTopology& numa_topology();

}  // namespace attend
