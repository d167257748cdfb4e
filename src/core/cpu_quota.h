// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <filesystem>
#include <optional>

namespace attend {

/// CPUs that the cgroup quota of this process allows, rounded up: the smallest of all its cgroups
/// and their ancestors, version 2 and 1. nullopt = no quota. `root` stands for "/" (tests).
std::optional<int> cgroup_cpu_limit(const std::filesystem::path& root);

}  // namespace attend
