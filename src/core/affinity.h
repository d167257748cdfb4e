// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>
#include <vector>

namespace attend {

/// CPUs that the calling thread may run on, ascending; empty if the system does not say.
std::vector<int> thread_cpus();

/// Lets the calling thread run on `cpus` only, and moves it there. False if the system refuses.
bool set_thread_cpus(std::span<const int> cpus);

}  // namespace attend
