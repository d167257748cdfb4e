// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <string_view>

#include "attend/backend/mla_prefill.h"
#include "registry/named.h"
#include "registry/select.h"

namespace attend {
namespace {

constexpr std::array<std::string_view, 1> kBestFirst = {"FLASH_ATTN"};
constexpr std::array<std::string_view, 2> kBestFirstOnRocm = {"ROCM_AITER_FA", "FLASH_ATTN"};

}  // namespace

std::vector<const MlaPrefillBackend*> mla_prefill_priority(const MlaPrefillConfig& config) {
  if (config.platform.type == DeviceType::rocm)
    return order_by_names(mla_prefill_backends(), kBestFirstOnRocm);
  return order_by_names(mla_prefill_backends(), kBestFirst);
}

MlaPrefillSelection select_mla_prefill(const MlaPrefillConfig& config) {
  const std::vector<const MlaPrefillBackend*> candidates = mla_prefill_priority(config);
  return select_first_of<MlaPrefillSelection, MlaPrefillBackend>(candidates, config);
}

MlaPrefillSelection select_mla_prefill(const MlaPrefillConfig& config, std::string_view name) {
  return select_only_of<MlaPrefillSelection>(find_mla_prefill_backend(name), config);
}

const MlaPrefillBackend& require_mla_prefill(const MlaPrefillConfig& config,
                                             std::string_view name) {
  const MlaPrefillSelection selection =
      name == "auto" ? select_mla_prefill(config) : select_mla_prefill(config, name);
  return require_choice(selection, "MLA prefill back end", name, describe(config));
}

}  // namespace attend
