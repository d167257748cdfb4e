// SPDX-License-Identifier: Apache-2.0
#include "backends/flash_attn/impl_config.h"

#include <fmt/format.h>

#include <cmath>
#include <optional>

#include "backends/common/layer_checks.h"
#include "backends/flash_attn/flash_attn.h"
#include "backends/flash_attn/metadata.h"
#include "core/check.h"

namespace attend::flash_attn {
namespace {

constexpr std::string_view kMakeOp = "FLASH_ATTN.make_impl";

StoredKv checked_storage(const ImplConfig& c) {
  const std::optional<StoredKv> stored = resolve_kv_cache_dtype(c.kv_cache_dtype, c.dtype);
  const bool encoder = is_encoder(c.attn_type);
  const bool served = stored && (stored->dtype == c.dtype ||
                                 (!encoder && (is_fp8(stored->dtype) || is_int8(stored->format))));
  check::require(
      served, {kMakeOp, "kv_cache_dtype"},
      [&] {
        return fmt::format("auto or {}{}", to_string(c.dtype),
                           encoder ? ""
                                   : ", fp8_e4m3, fp8_e5m2, int8_level1, int8_level2 or "
                                     "int8_per_token_head");
      },
      c.kv_cache_dtype);
  check::require(stored->format != KvFormat::int8_level2 || c.dtype != DType::f32,
                 {kMakeOp, "dtype"}, "f16 or bf16: int8_level2 keeps values in 16 bits",
                 to_string(c.dtype));
  return *stored;
}

void check_value_scales(const ImplConfig& c, KvFormat format) {
  const check::Where where{kMakeOp, "value_scales"};
  if (format != KvFormat::int8_level1) {
    check::require(c.value_scales.empty(), where, "none: the cache is not int8_level1",
                   c.value_scales.size());
    return;
  }
  const auto count =
      static_cast<std::size_t>(c.num_kv_heads) * static_cast<std::size_t>(c.head_size);
  check::require(
      c.value_scales.size() == count, where,
      [&] { return fmt::format("{} values, one a kv head and element", count); },
      c.value_scales.size());
  for (std::size_t i = 0; i < count; ++i) {
    const float x = c.value_scales[i];
    check::require(std::isfinite(x) && x > 0.0F, where, "finite values > 0",
                   [&] { return fmt::format("{} at index {}", x, i); });
  }
}

}  // namespace

StoredKv check_config(const ImplConfig& c) {
  const auto at = [](std::string_view argument) { return check::Where{kMakeOp, argument}; };
  check_heads(kMakeOp, c.num_q_heads, c.num_kv_heads, c.head_size);
  check::require(is_float_compute(c.dtype), at("dtype"), "f32, f16 or bf16", to_string(c.dtype));
  const StoredKv stored = checked_storage(c);
  check_kv_scales(kMakeOp, c, is_fp8(stored.dtype));
  check_value_scales(c, stored.format);
  check_softmax(kMakeOp, c);
  if (is_cross(c.attn_type)) {
    // Both depend on the place of a query among its keys, and cross attention has none.
    check::require(!c.sliding_window, at("sliding_window"), "unset for encoder_decoder",
                   c.sliding_window.value_or(0));
    check::require(c.alibi_slopes.empty(), at("alibi_slopes"), "none for encoder_decoder",
                   c.alibi_slopes.size());
  }
  check::require(!c.shares_kv_cache || !is_encoder(c.attn_type), at("shares_kv_cache"),
                 "false for an encoder, which has no cache", "true");
  return stored;
}

}  // namespace attend::flash_attn
