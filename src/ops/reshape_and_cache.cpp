// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "attend/ops/cache.h"
#include "core/check.h"
#include "ops/cache_rows.h"

namespace attend {
namespace {

using cache_rows::Target;

constexpr std::string_view kOp = "reshape_and_cache_flash";

std::span<const std::int64_t> validate(const ReshapeAndCacheFlashArgs& a) {
  cache_rows::require_rows(kOp, "key", a.key, {DType::f32, DType::f16, DType::bf16});
  cache_rows::require_rows(kOp, "value", a.value, {DType::f32, DType::f16, DType::bf16});
  check::require(
      a.value.dtype == a.key.dtype, {kOp, "value"},
      [&] { return fmt::format("dtype {} of key", to_string(a.key.dtype)); },
      [&] { return describe(a.value); });
  check::shape({kOp, "value"}, a.value, {a.key.shape[0], a.key.shape[1], -1});
  cache_rows::require_cache(kOp, "key_cache", a.key_cache, a.key,
                            {a.key.dtype, DType::fp8_e4m3, DType::fp8_e5m2});
  cache_rows::require_cache(kOp, "value_cache", a.value_cache, a.value, {a.key_cache.dtype});
  check::shape({kOp, "value_cache"}, a.value_cache,
               {a.key_cache.shape[0], a.key_cache.shape[1], -1, -1});
  const auto slots = cache_rows::require_slots(kOp, a.slot_mapping, a.key.shape[0],
                                               a.key_cache.shape[0] * a.key_cache.shape[1]);
  const bool scaled = is_fp8(a.key_cache.dtype);
  if (scaled) cache_rows::require_scales(kOp, a.k_scale, a.v_scale, a.key.shape[1]);

  check::no_overlap({kOp, "value_cache"}, a.value_cache, "key_cache", a.key_cache);
  const auto apart_from_inputs = [&](std::string_view name, const TensorView& cache) {
    check::no_overlap({kOp, name}, cache, "key", a.key);
    check::no_overlap({kOp, name}, cache, "value", a.value);
    check::no_overlap({kOp, name}, cache, "slot_mapping", a.slot_mapping);
    if (!scaled) return;
    check::no_overlap({kOp, name}, cache, "k_scale", a.k_scale);
    check::no_overlap({kOp, name}, cache, "v_scale", a.v_scale);
  };
  apart_from_inputs("key_cache", a.key_cache);
  apart_from_inputs("value_cache", a.value_cache);
  return slots;
}

}  // namespace

void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& a, Executor* executor) {
  const auto slots = validate(a);
  const std::array<Target, 2> targets = {
      {{a.key, a.key_cache, a.k_scale}, {a.value, a.value_cache, a.v_scale}}};
  cache_rows::write(targets, slots, executor);
}

}  // namespace attend
