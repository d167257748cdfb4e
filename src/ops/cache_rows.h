// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>

#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// Writing rows of a batch to their slots of a paged cache: what all cache writers share.
namespace attend::cache_rows {

/// A tensor of rows and the cache that they go to, of as many heads.
struct Target {
  ConstTensorView rows;        ///< [T', H, D]
  TensorView cache;            ///< [num_blocks, block_size, H, D]
  ConstTensorView scale = {};  ///< fp8 caches: f32 with 1 element or [H], any stride
};

/// Where a row goes.
struct Place {
  std::int64_t row = 0, block = 0, offset = 0;
};

/// Checks `slot_mapping`: i64 [T], contiguous, T <= `num_rows`, every slot below `capacity`.
/// Negative slots are fine. @throws InvalidArgument.
std::span<const std::int64_t> require_slots(std::string_view op,
                                            const ConstTensorView& slot_mapping,
                                            std::int64_t num_rows, std::int64_t capacity);

/// A cache [num_blocks, block_size, H, D] for `rows` [T', H, D]: one of `dtypes`, last stride 1,
/// no element twice. @throws InvalidArgument.
void require_cache(std::string_view op, std::string_view name, const TensorView& cache,
                   const ConstTensorView& rows, std::initializer_list<DType> dtypes);

/// Rows [T', H, D] of one of `dtypes` with last stride 1. @throws InvalidArgument.
void require_rows(std::string_view op, std::string_view name, const ConstTensorView& rows,
                  std::initializer_list<DType> dtypes);

/// Scales of an fp8 cache: each f32, contiguous, of 1 element or `heads`, finite and above 0.
/// @throws InvalidArgument that names k_scale or v_scale.
void require_scales(std::string_view op, const ConstTensorView& k_scale,
                    const ConstTensorView& v_scale, std::int64_t heads);

/// Calls write(place) for every row that has a slot, in order.
template <typename Write>
void for_each_row(std::span<const std::int64_t> slots, std::int64_t block_size, Write&& write) {
  for (std::size_t t = 0; t < slots.size(); ++t) {
    if (slots[t] < 0) continue;
    write(Place{static_cast<std::int64_t>(t), slots[t] / block_size, slots[t] % block_size});
  }
}

/// Calls write(target index, head_begin, head_end) for part `part` of `parts`. Work is cut along
/// (target, head), never along rows: each worker walks all rows in order and no two workers touch
/// the same bytes, so that the later of two rows with one slot wins as in a serial loop.
template <typename Write>
void for_part(std::int64_t targets, std::int64_t heads, std::int64_t part, std::int64_t parts,
              Write&& write) {
  const std::int64_t begin = targets * heads * part / parts;
  const std::int64_t end = targets * heads * (part + 1) / parts;
  for (std::int64_t i = 0; i < targets; ++i) {
    const std::int64_t head_begin = std::max<std::int64_t>(begin - i * heads, 0);
    const std::int64_t head_end = std::min(end - i * heads, heads);
    if (head_begin < head_end) write(static_cast<std::size_t>(i), head_begin, head_end);
  }
}

/// Runs write(target index, head_begin, head_end) over all heads of all targets: alone if the work
/// is `small`, else on the executor (null = the default one).
template <typename Write>
void run(std::size_t targets, std::int64_t heads, bool small, Executor* executor, Write&& write) {
  const auto count = static_cast<std::int64_t>(targets);
  if (small) {
    for_part(count, heads, 0, 1, write);
    return;
  }
  Executor& workers = executor != nullptr ? *executor : default_executor();
  workers.run([&](int worker) { for_part(count, heads, worker, workers.num_workers(), write); });
}

/// Copies the rows bit for bit. @pre rows and cache of a target agree in dtype and D.
void copy(std::span<const Target> targets, std::span<const std::int64_t> slots, Executor* executor);

/// Copies the rows or, into fp8 caches, encodes row / scale. @pre at least one target; all agree in
/// the dtypes of rows and caches and in H; fp8 caches have scales.
void write(std::span<const Target> targets, std::span<const std::int64_t> slots,
           Executor* executor);

}  // namespace attend::cache_rows
