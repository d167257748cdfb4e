// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <string>

#include "attend/backend/mla_prefill.h"
#include "core/check.h"

namespace attend {

std::unique_ptr<MlaPrefill> MlaPrefillBackend::make_impl(const MlaPrefillImplConfig& config) const {
  const std::string op = fmt::format("{}.make_impl", name());
  check::require(config.num_heads >= 1, {op, "num_heads"}, "a number >= 1", config.num_heads);
  if (config.scale) {
    check::require(std::isfinite(*config.scale) && *config.scale > 0.0F, {op, "scale"},
                   "a finite value > 0", *config.scale);
  }
  MlaPrefillConfig asked;
  asked.platform = config.platform;
  asked.dtype = config.dtype;
  asked.dims = config.dims;
  if (std::vector<std::string> reasons = validate_configuration(asked); !reasons.empty()) {
    throw Unsupported(
        fmt::format("MLA prefill back end {} is not valid for {{{}}}", name(), describe(asked)),
        std::move(reasons));
  }
  return make_checked_impl(config);
}

}  // namespace attend
