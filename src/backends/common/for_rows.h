// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/executor.h"

namespace attend {

/// Calls work(begin, end) for parts of [0, rows), on all workers if there is enough to do. What a
/// row becomes must not depend on the others.
template <typename Work>
void for_rows(std::int64_t rows, std::int64_t bytes_per_row, Executor& executor, Work work) {
  // About what one worker copies while the others wake up.
  constexpr std::int64_t kParallelBytes = 256 << 10;
  if (rows * bytes_per_row < kParallelBytes) {
    work(0, rows);
    return;
  }
  const std::int64_t n = executor.num_workers();
  executor.run([&](int worker) { work(rows * worker / n, rows * (worker + 1) / n); });
}

}  // namespace attend
