// SPDX-License-Identifier: Apache-2.0
#include "ops/rotary.h"

#include <cstring>

#include "attend/core/float_types.h"

namespace attend::ops {
namespace {

template <typename T, typename Table>
void rotate(const RotaryTables& tables, std::int64_t position, const T* from, T* to) noexcept {
  const std::int64_t pairs = tables.cos.shape[1];
  const Table* cos = tables.cos.as<Table>() + position * tables.cos.strides[0];
  const Table* sin = tables.sin.as<Table>() + position * tables.sin.strides[0];
  for (std::int64_t i = 0; i < pairs; ++i) {
    const std::int64_t first = tables.interleaved ? 2 * i : i;
    const std::int64_t second = tables.interleaved ? 2 * i + 1 : i + pairs;
    const float x = to_f32(from[first]), y = to_f32(from[second]);
    const float c = to_f32(cos[i]), s = to_f32(sin[i]);
    to[first] = from_f32<T>(x * c - y * s);
    to[second] = from_f32<T>(x * s + y * c);
  }
}

template <typename T>
void rotate_as(const RotaryTables& tables, std::int64_t position, const void* from,
               void* to) noexcept {
  const auto* x = static_cast<const T*>(from);
  auto* y = static_cast<T*>(to);
  tables.cos.dtype == DType::f32 ? rotate<T, float>(tables, position, x, y)
                                 : rotate<T, T>(tables, position, x, y);
}

}  // namespace

void rotate_row(const RotaryTables& tables, std::int64_t position, const void* from, void* to,
                std::int64_t head_dim, DType dtype) noexcept {
  if (to != from) std::memcpy(to, from, static_cast<std::size_t>(head_dim) * size_of(dtype));
  if (!tables.defined()) return;
  switch (dtype) {
    case DType::f32:
      return rotate_as<float>(tables, position, from, to);
    case DType::f16:
      return rotate_as<f16>(tables, position, from, to);
    default:
      return rotate_as<bf16>(tables, position, from, to);
  }
}

}  // namespace attend::ops
