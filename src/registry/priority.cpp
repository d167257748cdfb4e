// SPDX-License-Identifier: Apache-2.0
#include "registry/priority.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "attend/backend/selector.h"

namespace attend {
namespace {

struct PriorityRow {
  DeviceType device;
  bool use_mla;
  std::array<std::string_view, 2> names;  ///< best first
};

constexpr std::array<PriorityRow, 6> kPriorities = {{
    {DeviceType::cpu, false, {"FLASH_ATTN", "DIFFERENTIAL_FLASH_ATTN"}},
    {DeviceType::cpu, true, {"FLASH_ATTN_MLA", "FLASHMLA_SPARSE"}},
    {DeviceType::cuda, false, {"FLASH_ATTN", "DIFFERENTIAL_FLASH_ATTN"}},
    {DeviceType::cuda, true, {"FLASH_ATTN_MLA", "FLASHMLA_SPARSE"}},
    {DeviceType::rocm, false, {"FLASH_ATTN", "DIFFERENTIAL_FLASH_ATTN"}},
    {DeviceType::rocm, true, {"FLASH_ATTN_MLA", "FLASHMLA_SPARSE"}},
}};

}  // namespace

std::vector<const Backend*> order_by_priority(std::span<const Backend* const> all,
                                              const AttentionConfig& config) {
  std::vector<const Backend*> ordered;
  for (const PriorityRow& row : kPriorities) {
    if (row.device != config.platform.type || row.use_mla != config.use_mla) continue;
    for (const std::string_view name : row.names) {
      const auto it =
          std::find_if(all.begin(), all.end(), [&](const Backend* b) { return b->name() == name; });
      if (it != all.end()) ordered.push_back(*it);
    }
  }
  for (const Backend* backend : all) {
    if (std::find(ordered.begin(), ordered.end(), backend) == ordered.end()) {
      ordered.push_back(backend);
    }
  }
  return ordered;
}

std::vector<const Backend*> backend_priority(const AttentionConfig& config) {
  return order_by_priority(backends(), config);
}

}  // namespace attend
