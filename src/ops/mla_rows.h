// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "attend/cache/row_format.h"
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// What the ops on caches of MLA share.
namespace attend::mla_rows {

/// A cache [num_blocks, block_size, E] of one of `dtypes`, last stride 1. @throws InvalidArgument.
void require_cache(std::string_view op, std::string_view name, const ConstTensorView& cache,
                   std::initializer_list<DType> dtypes);

/// The format of a cache of bytes (u8), by the size of its rows. @throws InvalidArgument if there
/// is none, or the rows of a block do not adjoin where the format says so.
const RowFormat& require_row_format(std::string_view op, std::string_view name,
                                    const ConstTensorView& cache);

/// Elements from a row to the next one of its block.
std::int64_t row_stride(const ConstTensorView& cache) noexcept;

/// The scale of an fp8 cache: f32 with 1 element, finite, > 0. @throws InvalidArgument.
float require_scale(std::string_view op, const ConstTensorView& scale);

/// Runs task(worker, workers): alone if the work is `small`, else on the executor (null = the
/// default one).
template <typename Task>
void run(bool small, Executor* executor, Task&& task) {
  if (small) {
    task(0, 1);
    return;
  }
  Executor& workers = executor != nullptr ? *executor : default_executor();
  workers.run([&](int worker) { task(worker, workers.num_workers()); });
}

// Waking the workers costs as much as this much work alone.
inline constexpr std::int64_t kParallelCopyBytes = 256 << 10;
inline constexpr std::int64_t kParallelElements = 64 << 10;

}  // namespace attend::mla_rows
