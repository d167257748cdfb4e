// SPDX-License-Identifier: Apache-2.0
#include "attend/core/tensor_view.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace attend {

std::string describe(const ConstTensorView& t) {
  const std::span<const std::int64_t> dims(t.shape.data(), static_cast<std::size_t>(t.rank));
  return fmt::format("[{}] {} {}", fmt::join(dims, ", "), to_string(t.dtype), to_string(t.device));
}

}  // namespace attend
