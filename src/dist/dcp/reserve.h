// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"

namespace attend::dcp {

/// A contiguous tensor in `buffer`, which grows if it must.
inline TensorView reserve(Buffer& buffer, DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView t(nullptr, dtype, shape);
  // A view must point somewhere even if it has no element.
  const std::int64_t elements = std::max<std::int64_t>(t.numel(), 1);
  buffer.reserve(static_cast<std::size_t>(elements) * size_of(dtype));
  t.data = buffer.data();
  return t;
}

}  // namespace attend::dcp
