// SPDX-License-Identifier: Apache-2.0
// Reads a Capability against an AttentionConfig. The order of the reasons is fixed: see
// docs/selection.md.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "attend/backend/backend.h"
#include "backends/common/kv_cache_dtype.h"
#include "backends/common/reasons.h"

namespace attend {
namespace {

using Reasons = std::vector<std::string>;

void check_head_size(const Capability& can, const AttentionConfig& c, Reasons& reasons) {
  const bool fits_rules = c.head_size > 0 && c.head_size % can.head_size_multiple == 0 &&
                          (can.max_head_size == 0 || c.head_size <= can.max_head_size);
  if (fits_rules && (can.head_sizes.empty() || contains(can.head_sizes, c.head_size))) return;
  std::string rule;
  if (!can.head_sizes.empty()) {
    rule = one_of(can.head_sizes, [](int n) { return n; });
  } else if (can.max_head_size == 0) {
    rule = fmt::format("a positive multiple of {}", can.head_size_multiple);
  } else {
    rule = fmt::format("a multiple of {}, at most {}", can.head_size_multiple, can.max_head_size);
  }
  reasons.push_back(fmt::format("head_size not supported: {} (must be {})", c.head_size, rule));
}

void check_kv_cache_dtype(const Capability& can, const AttentionConfig& c, Reasons& reasons) {
  const std::string wanted = canonical_kv_cache_dtype(c.kv_cache_dtype);
  if (can.kv_cache_dtypes.empty() || contains(can.kv_cache_dtypes, wanted)) return;
  reasons.push_back(
      fmt::format("kv_cache_dtype not supported: {} (must be {})", c.kv_cache_dtype,
                  one_of(can.kv_cache_dtypes, [](const std::string& s) { return s; })));
}

void check_block_size(const Capability& can, const AttentionConfig& c, Reasons& reasons) {
  if (!c.block_size) return;
  const int size = *c.block_size;
  const bool fits = std::any_of(can.block_sizes.begin(), can.block_sizes.end(),
                                [&](int base) { return size % base == 0; });
  if (size > 0 && (can.block_sizes.empty() || fits)) return;
  const std::string rule =
      can.block_sizes.empty()
          ? "positive"
          : "a multiple of " + one_of(can.block_sizes, [](int base) { return base; });
  reasons.push_back(fmt::format("block_size not supported: {} (must be {})", size, rule));
}

void check_attn_type(const Capability& can, const AttentionConfig& c, Reasons& reasons) {
  if (contains(can.attn_types, c.attn_type)) return;
  reasons.push_back(
      fmt::format("attention type {} not supported (must be {})", to_string(c.attn_type),
                  one_of(can.attn_types, [](AttentionType t) { return to_string(t); })));
}

}  // namespace

std::vector<std::string> Backend::validate_configuration(const AttentionConfig& c) const {
  const Capability& can = capability();
  Reasons reasons;
  const auto add = [&](std::optional<std::string> reason) {
    if (reason) reasons.push_back(*std::move(reason));
  };
  const auto refuse_if = [&](bool refused, std::string_view reason) {
    if (refused) reasons.emplace_back(reason);
  };
  check_head_size(can, c, reasons);
  add(dtype_reason(can.dtypes, can.cpu_only_dtypes, c.dtype, c.platform));
  check_kv_cache_dtype(can, c, reasons);
  check_block_size(can, c, reasons);
  refuse_if(c.use_mm_prefix && !can.supports_mm_prefix,
            "partial multimodal token full attention not supported");
  refuse_if(c.use_mla && !can.is_mla, "MLA not supported");
  refuse_if(!c.use_mla && can.is_mla, "non-MLA not supported");
  refuse_if(c.has_sink && !can.supports_sink, "attention sinks not supported");
  refuse_if(c.use_alibi_sqrt && !can.supports_alibi_sqrt, "square-root ALiBi not supported");
  refuse_if(c.use_sparse && !can.is_sparse, "sparse not supported");
  refuse_if(!c.use_sparse && can.is_sparse, "non-sparse not supported");
  refuse_if(c.use_differential && !can.is_differential, "differential not supported");
  refuse_if(!c.use_differential && can.is_differential, "non-differential not supported");
  refuse_if(c.use_per_head_quant_scales && !can.supports_per_head_quant_scales,
            "per-head quant scales not supported");
  add(cuda_capability_reason(can.min_cuda_capability, c.platform));
  check_attn_type(can, c, reasons);
  refuse_if(c.use_non_causal && !can.supports_non_causal, "non-causal attention not supported");
  refuse_if(c.batch_invariant && !can.supports_batch_invariance, "batch invariance not supported");
  refuse_if(c.use_kv_connector && !can.supports_kv_connector, "KV connector not supported");
  add(supports_combination(c));
  return reasons;
}

int Backend::preferred_block_size(int preferred) const noexcept {
  const std::vector<int>& bases = capability().block_sizes;
  const bool fits = bases.empty() || std::any_of(bases.begin(), bases.end(),
                                                 [&](int base) { return preferred % base == 0; });
  if (preferred > 0 && fits) return preferred;
  return bases.empty() ? 1 : *std::min_element(bases.begin(), bases.end());
}

}  // namespace attend
