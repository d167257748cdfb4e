// SPDX-License-Identifier: Apache-2.0
// Reads an MlaPrefillCapability against an MlaPrefillConfig. The order of the reasons is fixed: see
// docs/selection.md.
#include <fmt/format.h>

#include <utility>

#include "attend/backend/mla_prefill.h"
#include "backends/common/reasons.h"

namespace attend {
namespace {

std::string describe(const MlaDims& d) {
  return fmt::format("kv_lora_rank={}, qk_nope_head_dim={}, qk_rope_head_dim={}, v_head_dim={}",
                     d.kv_lora_rank, d.qk_nope_head_dim, d.qk_rope_head_dim, d.v_head_dim);
}

std::optional<std::string> arch_reason(const MlaPrefillCapability& can, const Platform& p) {
  if (p.type != DeviceType::rocm || can.rocm_archs.empty() || contains(can.rocm_archs, p.arch))
    return std::nullopt;
  return fmt::format("compute capability not supported: {} (must be {})", p.arch,
                     one_of(can.rocm_archs, [](const std::string& arch) { return arch; }));
}

std::optional<std::string> dims_reason(const MlaPrefillCapability& can, const MlaDims& dims) {
  bool fits = true;
  // Sums are formed of numbers that have passed: a sum of any others may overflow.
  for (const int n :
       {dims.kv_lora_rank, dims.qk_nope_head_dim, dims.qk_rope_head_dim, dims.v_head_dim}) {
    fits = fits && n > 0 && n % can.dim_multiple == 0;
  }
  const auto within = [&](int n) { return can.max_head_dim == 0 || n <= can.max_head_dim; };
  fits = fits && within(dims.qk_nope_head_dim) && within(dims.qk_rope_head_dim) &&
         within(dims.v_head_dim) && within(dims.qk_head_dim());
  if (fits) return std::nullopt;
  const std::string most =
      can.max_head_dim == 0
          ? std::string()
          : fmt::format(", heads of queries and values at most {}", can.max_head_dim);
  return fmt::format("MLA dimensions not supported: {} (must be positive multiples of {}{})",
                     describe(dims), can.dim_multiple, most);
}

/// @pre the dims fit.
std::optional<std::string> padding_reason(const MlaPrefillBackend& backend,
                                          const MlaPrefillConfig& c) {
  if (!backend.requires_v_padding(c.platform) || c.dims.v_head_dim <= c.dims.qk_head_dim())
    return std::nullopt;
  return fmt::format(
      "MLA dimensions not supported: v_head_dim {} on {} (values are padded to the {} columns of "
      "keys there)",
      c.dims.v_head_dim, to_string(c.platform), c.dims.qk_head_dim());
}

}  // namespace

std::string describe(const MlaPrefillConfig& c) {
  return fmt::format("platform={}, dtype={}, {}{}{}", to_string(c.platform), to_string(c.dtype),
                     describe(c.dims), c.batch_invariant ? ", batch_invariant" : "",
                     c.quant_output ? ", quant_output" : "");
}

std::optional<std::string> MlaPrefillBackend::quant_output_reason(const Platform& platform) const {
  const std::vector<DeviceType>& devices = capability().quant_output_devices;
  if (contains(devices, platform.type)) return std::nullopt;
  if (devices.empty()) return "fused quantised output not supported";
  return fmt::format("fused quantised output not supported: {} (must be {})", to_string(platform),
                     one_of(devices, [](DeviceType t) { return to_string(t); }));
}

std::vector<std::string> MlaPrefillBackend::validate_configuration(
    const MlaPrefillConfig& c) const {
  const MlaPrefillCapability& can = capability();
  std::vector<std::string> reasons;
  const auto add = [&](std::optional<std::string> reason) {
    if (reason) reasons.push_back(*std::move(reason));
  };
  add(cuda_capability_reason(can.min_cuda_capability, c.platform));
  add(arch_reason(can, c.platform));
  add(dtype_reason(can.dtypes, can.cpu_only_dtypes, c.dtype, c.platform));
  if (!is_available(c.platform)) {
    reasons.push_back(
        fmt::format("required dependencies not available: {}", to_string(c.platform)));
  }
  const std::optional<std::string> dims = dims_reason(can, c.dims);
  add(dims ? dims : padding_reason(*this, c));
  if (c.batch_invariant && !can.supports_batch_invariance)
    reasons.emplace_back("batch invariance not supported");
  if (c.quant_output) add(quant_output_reason(c.platform));
  return reasons;
}

}  // namespace attend
