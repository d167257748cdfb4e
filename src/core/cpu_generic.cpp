// SPDX-License-Identifier: Apache-2.0
#include <fstream>

#include "core/cpu_detect.h"

namespace attend {
namespace {

std::string model_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    const auto colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return {};
}

}  // namespace

// There is one level only, so that nothing can be chosen.
std::string detect_cpu_signature() { return "generic"; }

CpuInfo detect_cpu() {
  CpuInfo info;
  info.model = model_name();
  add_os_cache_sizes(info);
  return info;
}

}  // namespace attend
