// SPDX-License-Identifier: Apache-2.0
#include "backends/common/reasons.h"

namespace attend {

std::optional<std::string> dtype_reason(const std::vector<DType>& dtypes,
                                        const std::vector<DType>& cpu_only, DType dtype,
                                        const Platform& platform) {
  std::vector<DType> served = dtypes;
  const bool on_cpu = platform.type == DeviceType::cpu;
  if (!on_cpu) std::erase_if(served, [&](DType t) { return contains(cpu_only, t); });
  if (dtypes.empty() || contains(served, dtype)) return std::nullopt;
  const bool cpu_would_do = !on_cpu && contains(dtypes, dtype);
  return fmt::format("dtype not supported: {}{} (must be {})", to_string(dtype),
                     cpu_would_do ? fmt::format(" on {}", to_string(platform)) : std::string(),
                     one_of(served, [](DType t) { return to_string(t); }));
}

std::optional<std::string> cuda_capability_reason(int least, const Platform& platform) {
  if (platform.type != DeviceType::cuda || platform.capability() >= least) return std::nullopt;
  return fmt::format("compute capability not supported: {}.{} (must be at least {}.{})",
                     platform.capability_major, platform.capability_minor, least / 10, least % 10);
}

}  // namespace attend
