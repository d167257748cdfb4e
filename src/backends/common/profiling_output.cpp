// SPDX-License-Identifier: Apache-2.0
#include "backends/common/profiling_output.h"

#include <cstring>
#include <limits>

namespace attend {

void fill_profiling_output(const TensorView& output, const TensorView& lse) {
  const auto row_bytes = static_cast<std::size_t>(output.shape[2]) * size_of(output.dtype);
  for (std::int64_t t = 0; t < output.shape[0]; ++t) {
    for (std::int64_t h = 0; h < output.shape[1]; ++h)
      std::memset(output.select(0, t).select(0, h).data, 0, row_bytes);
    if (!lse.defined()) continue;
    for (std::int64_t h = 0; h < lse.shape[1]; ++h)
      *lse.select(0, t).select(0, h).as<float>() = -std::numeric_limits<float>::infinity();
  }
}

}  // namespace attend
