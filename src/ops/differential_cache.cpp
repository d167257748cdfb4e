// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/differential_cache.h"

#include <array>

#include "core/check.h"
#include "ops/cache_rows.h"

namespace attend {
namespace {

using cache_rows::Target;

constexpr std::string_view kOp = "differential_reshape_and_cache";
constexpr std::int64_t kBranches = 2;

std::span<const std::int64_t> validate(const DifferentialReshapeAndCacheArgs& a) {
  cache_rows::require_rows(kOp, "key", a.key, {DType::f32, DType::f16, DType::bf16});
  const auto [tokens, heads, dim] = std::array{a.key.shape[0], a.key.shape[1], a.key.shape[2]};
  check::require(heads % kBranches == 0, {kOp, "key"}, "an even number of heads",
                 [&] { return describe(a.key); });
  cache_rows::require_rows(kOp, "value", a.value, {a.key.dtype});
  check::shape({kOp, "value"}, a.value, {tokens, heads, dim});

  const check::Where cache{kOp, "kv_cache"};
  check::tensor(cache, a.kv_cache, 6, {a.key.dtype, DType::fp8_e4m3, DType::fp8_e5m2});
  check::shape(cache, a.kv_cache, {kBranches, 2, -1, -1, heads / kBranches, dim});
  check::unit_last_stride(cache, a.kv_cache);
  check::distinct_elements(cache, a.kv_cache);
  const auto slots = cache_rows::require_slots(kOp, a.slot_mapping, tokens,
                                               a.kv_cache.shape[2] * a.kv_cache.shape[3]);

  check::no_overlap(cache, a.kv_cache, "key", a.key);
  check::no_overlap(cache, a.kv_cache, "value", a.value);
  check::no_overlap(cache, a.kv_cache, "slot_mapping", a.slot_mapping);
  if (is_fp8(a.kv_cache.dtype)) {
    cache_rows::require_scales(kOp, a.k_scale, a.v_scale, heads);
    check::no_overlap(cache, a.kv_cache, "k_scale", a.k_scale);
    check::no_overlap(cache, a.kv_cache, "v_scale", a.v_scale);
  }
  return slots;
}

// The entries of `dim` that belong to heads of one branch.
ConstTensorView heads_of(const ConstTensorView& t, int dim, HeadPairing pairing,
                         std::int64_t branch) {
  const std::int64_t pairs = t.shape[dim] / kBranches;
  if (pairing == HeadPairing::halves) return t.slice(dim, branch * pairs, pairs);
  ConstTensorView heads = t.slice(dim, branch, pairs);
  heads.strides[dim] *= kBranches;
  return heads;
}

Target target(const DifferentialReshapeAndCacheArgs& a, std::int64_t branch, bool values) {
  const ConstTensorView& scale = values ? a.v_scale : a.k_scale;
  Target t{.rows = heads_of(values ? a.value : a.key, 1, a.pairing, branch),
           .cache = a.kv_cache.select(0, branch).select(0, values ? 1 : 0)};
  if (is_fp8(a.kv_cache.dtype))
    t.scale = scale.numel() == 1 ? scale : heads_of(scale, 0, a.pairing, branch);
  return t;
}

}  // namespace

void differential_reshape_and_cache(const DifferentialReshapeAndCacheArgs& a, Executor* executor) {
  const auto slots = validate(a);
  const std::array<Target, 4> targets = {
      {target(a, 0, false), target(a, 0, true), target(a, 1, false), target(a, 1, true)}};
  cache_rows::write(targets, slots, executor);
}

}  // namespace attend
