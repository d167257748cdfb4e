// SPDX-License-Identifier: Apache-2.0
#include "registry/priority.h"

#include <array>
#include <string_view>

#include "attend/backend/selector.h"
#include "registry/named.h"

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
  for (const PriorityRow& row : kPriorities) {
    if (row.device == config.platform.type && row.use_mla == config.use_mla)
      return order_by_names(all, row.names);
  }
  return {all.begin(), all.end()};
}

std::vector<const Backend*> backend_priority(const AttentionConfig& config) {
  return order_by_priority(backends(), config);
}

}  // namespace attend
