// SPDX-License-Identifier: Apache-2.0
#include "backends/common/copy_rope.h"

#include <cstring>

#include "backends/common/for_rows.h"

namespace attend {

void copy_rope(const ConstTensorView& from, const TensorView& to, Executor& executor) {
  const auto bytes = static_cast<std::size_t>(to.shape[2]) * size_of(to.dtype);
  const std::int64_t heads = to.shape[1];
  for_rows(to.shape[0], heads * static_cast<std::int64_t>(bytes), executor,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t t = begin; t < end; ++t) {
               for (std::int64_t h = 0; h < heads; ++h) {
                 std::memcpy(to.select(0, t).select(0, h).data,
                             from.select(0, t).select(0, from.shape[1] == 1 ? 0 : h).data, bytes);
               }
             }
           });
}

}  // namespace attend
