// SPDX-License-Identifier: Apache-2.0
#include "ops/mla_rows.h"

#include <cmath>

#include "core/check.h"

namespace attend::mla_rows {

void require_cache(std::string_view op, std::string_view name, const ConstTensorView& cache,
                   std::initializer_list<DType> dtypes) {
  const check::Where where{op, name};
  check::tensor(where, cache, 3, dtypes);
  check::unit_last_stride(where, cache);
}

const RowFormat& require_row_format(std::string_view op, std::string_view name,
                                    const ConstTensorView& cache) {
  const check::Where where{op, name};
  const RowFormat* format = find_row_format(cache.shape[2]);
  check::require(
      format != nullptr, where, [] { return fmt::format("rows of {}", describe_row_formats()); },
      [&] { return describe(cache); });
  if (!format->scales_apart) return *format;
  check::require(
      cache.shape[1] <= 1 || cache.strides[1] == format->row_bytes, where,
      [&] { return fmt::format("blocks of {} without gaps", format->name); },
      [&] { return fmt::format("stride {} between rows", cache.strides[1]); });
  check::require(
      cache.shape[0] <= 1 || cache.strides[0] >= cache.shape[1] * format->row_bytes, where,
      [&] { return fmt::format("blocks of {} behind each other", format->name); },
      [&] { return fmt::format("stride {} between blocks", cache.strides[0]); });
  return *format;
}

std::int64_t row_stride(const ConstTensorView& cache) noexcept {
  const RowFormat* format = cache.dtype == DType::u8 ? find_row_format(cache.shape[2]) : nullptr;
  return format != nullptr && format->scales_apart ? format->step : cache.strides[1];
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
