// SPDX-License-Identifier: Apache-2.0
#include "ops/mla_rows.h"

#include <cmath>

#include "attend/cache/fp8_ds_mla.h"
#include "core/check.h"

namespace attend::mla_rows {

void require_cache(std::string_view op, std::string_view name, const ConstTensorView& cache,
                   std::initializer_list<DType> dtypes) {
  const check::Where where{op, name};
  check::tensor(where, cache, 3, dtypes);
  check::unit_last_stride(where, cache);
}

void require_row_size(std::string_view op, std::string_view name, const ConstTensorView& cache,
                      std::int64_t elements) {
  const check::Where where{op, name};
  if (cache.dtype != DType::u8) {
    check::shape(where, cache, {-1, -1, elements});
    return;
  }
  check::require(
      cache.shape[2] == fp8_ds_mla::kRowBytes && elements == fp8_ds_mla::kDim, where,
      [] {
        return fmt::format("fp8_ds_mla rows of {} bytes for {} + {} elements",
                           fp8_ds_mla::kRowBytes, fp8_ds_mla::kLatent, fp8_ds_mla::kRope);
      },
      [&] { return fmt::format("{} for {} elements", describe(cache), elements); });
}

float require_scale(std::string_view op, const ConstTensorView& scale) {
  const check::Where where{op, "scale"};
  check::require(scale.defined(), where, "a scale, which an fp8 cache needs", "none");
  check::tensor(where, scale, scale.rank == 0 ? 0 : 1, {DType::f32});
  check::require(scale.numel() == 1, where, "1 element", [&] { return describe(scale); });
  const float s = *scale.as<float>();
  check::require(std::isfinite(s) && s > 0.0F, where, "a finite scale above 0", s);
  return s;
}

}  // namespace attend::mla_rows
