// SPDX-License-Identifier: Apache-2.0
// Text forms of what a back end is asked for.
#include <fmt/format.h>

#include <array>
#include <utility>

#include "attend/backend/backend.h"

namespace attend {
namespace {

constexpr std::array<std::pair<AttentionType, std::string_view>, 4> kAttentionTypes = {{
    {AttentionType::decoder, "decoder"},
    {AttentionType::encoder, "encoder"},
    {AttentionType::encoder_only, "encoder_only"},
    {AttentionType::encoder_decoder, "encoder_decoder"},
}};

}  // namespace

std::string_view to_string(AttentionType t) noexcept {
  for (const auto& [type, name] : kAttentionTypes) {
    if (type == t) return name;
  }
  return "invalid";
}

std::optional<AttentionType> parse_attention_type(std::string_view text) noexcept {
  for (const auto& [type, name] : kAttentionTypes) {
    if (name == text) return type;
  }
  return std::nullopt;
}

std::string describe(const AttentionConfig& c) {
  std::string text = fmt::format(
      "platform={}, head_size={}, dtype={}, kv_cache_dtype={}, block_size={}, attn_type={}",
      to_string(c.platform), c.head_size, to_string(c.dtype), c.kv_cache_dtype,
      c.block_size ? fmt::to_string(*c.block_size) : "any", to_string(c.attn_type));
  const std::array<std::pair<bool, std::string_view>, 10> flags = {{
      {c.use_mla, "use_mla"},
      {c.has_sink, "has_sink"},
      {c.use_sparse, "use_sparse"},
      {c.use_differential, "use_differential"},
      {c.use_mm_prefix, "use_mm_prefix"},
      {c.use_per_head_quant_scales, "use_per_head_quant_scales"},
      {c.use_non_causal, "use_non_causal"},
      {c.use_alibi_sqrt, "use_alibi_sqrt"},
      {c.batch_invariant, "batch_invariant"},
      {c.use_kv_connector, "use_kv_connector"},
  }};
  for (const auto& [set, name] : flags) {
    if (set) text += fmt::format(", {}", name);
  }
  return text;
}

}  // namespace attend
