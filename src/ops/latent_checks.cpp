// SPDX-License-Identifier: Apache-2.0
#include "ops/latent_checks.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attend/cache/row_format.h"
#include "attend/plan/attention_plan.h"
#include "core/check.h"
#include "ops/mla_rows.h"

namespace attend::ops {
namespace {

bool is_coded(const LatentTensors& t) { return t.cache.dtype == DType::u8; }

void check_types(std::string_view op, const LatentTensors& t) {
  if (is_coded(t)) {
    check::tensor({op, "q"}, t.q, 3, {DType::bf16});
  } else {
    check::tensor({op, "q"}, t.q, 3, {DType::f32, DType::f16, DType::bf16});
  }
  check::tensor({op, t.cache_name}, t.cache, 3,
                {t.q.dtype, DType::fp8_e4m3, DType::fp8_e5m2, DType::u8});
  check::tensor({op, "out"}, t.out, 3, {t.q.dtype});
}

void check_coded_shapes(std::string_view op, const LatentTensors& t) {
  const RowFormat& f = mla_rows::require_row_format(op, t.cache_name, t.cache);
  check::shape({op, "q"}, t.q, {-1, -1, row_dim(f)});
  check::shape({op, "out"}, t.out, {t.q.shape[0], t.q.shape[1], f.value_dim});
}

void check_plain_shapes(std::string_view op, const LatentTensors& t) {
  const std::int64_t dim = t.q.shape[2];
  check::shape({op, t.cache_name}, t.cache, {-1, -1, dim});
  check::shape({op, "out"}, t.out, {t.q.shape[0], t.q.shape[1], -1});
  const std::int64_t latent = t.out.shape[2], most = std::min<std::int64_t>(dim, kMaxHeadDimV);
  check::require(
      latent > 0 && latent % 8 == 0 && latent <= most, {op, "out"},
      [&] { return fmt::format("a last dimension that is a multiple of 8 in [8, {}]", most); },
      latent);
}

}  // namespace

void check_latents(std::string_view op, const LatentTensors& t) {
  check_types(op, t);
  const std::int64_t dim = t.q.shape[2];
  check::require(t.q.shape[1] > 0, {op, "q"}, "at least 1 head", [&] { return describe(t.q); });
  check::require(
      dim > 0 && dim % 8 == 0 && dim <= kMaxHeadDimQk, {op, "q"},
      [] {
        return fmt::format("a last dimension that is a multiple of 8 in [8, {}]", kMaxHeadDimQk);
      },
      dim);
  if (is_coded(t)) {
    check_coded_shapes(op, t);
  } else {
    check_plain_shapes(op, t);
  }
  check::unit_last_stride({op, "q"}, t.q);
  check::unit_last_stride({op, t.cache_name}, t.cache);
  check::unit_last_stride({op, "out"}, t.out);
}

void check_latent_scale(std::string_view op, const LatentTensors& t,
                        const ConstTensorView& kv_scale) {
  const check::Where where{op, "kv_scale"};
  if (!is_fp8(t.cache.dtype)) {
    check::require(
        !kv_scale.defined(), where,
        [&] { return fmt::format("undefined: {} has no fp8 codes of one scale", t.cache_name); },
        "a tensor");
    return;
  }
  check::require(
      kv_scale.defined(), where,
      [&] { return fmt::format("f32, 1 element: {} is fp8", t.cache_name); },
      "an undefined tensor");
  check::tensor(where, kv_scale, kv_scale.rank == 0 ? 0 : 1, {DType::f32});
  check::require(kv_scale.numel() == 1, where, "1 element", kv_scale.numel());
  const float scale = *kv_scale.as<float>();
  check::require(std::isfinite(scale) && scale > 0.0F, where, "a finite value > 0", scale);
}

}  // namespace attend::ops
