// SPDX-License-Identifier: Apache-2.0
#include "ops/cache_rows.h"

#include <cstring>

#include "core/check.h"
#include "kernels/cpu/copy/stream_copy.h"

namespace attend::cache_rows {
namespace {

// Waking the workers costs as much as copying this much alone.
constexpr std::int64_t kParallelBytes = 256 << 10;

// More than the private caches of a few cores: the rows would leave them before attention reads
// them.
constexpr std::int64_t kStreamBytes = 8 << 20;

void copy_cached(std::byte* dst, const std::byte* src, std::size_t bytes) noexcept {
  std::memcpy(dst, src, bytes);
}

// Copies heads [head_begin, head_end) of every row.
template <auto kCopy>
void copy_heads(const Target& target, std::span<const std::int64_t> slots, std::int64_t head_begin,
                std::int64_t head_end) noexcept {
  const ConstTensorView& rows = target.rows;
  const TensorView& cache = target.cache;
  const auto item = static_cast<std::int64_t>(size_of(rows.dtype));
  const std::int64_t head_elements = rows.shape[2];
  // In NHD the heads of a row are one run of bytes on both sides.
  const bool one_run = rows.strides[1] == head_elements && cache.strides[2] == head_elements;
  const std::int64_t runs = one_run ? 1 : head_end - head_begin;
  const auto run_bytes =
      static_cast<std::size_t>(head_elements * item * (one_run ? head_end - head_begin : 1));
  const auto* src = rows.as<std::byte>() + head_begin * rows.strides[1] * item;
  auto* dst = cache.as<std::byte>() + head_begin * cache.strides[2] * item;

  for_each_row(slots, cache.shape[1], [&](const Place& place) {
    const auto* from = src + place.row * rows.strides[0] * item;
    auto* to = dst + (place.block * cache.strides[0] + place.offset * cache.strides[1]) * item;
    for (std::int64_t r = 0; r < runs; ++r) {
      kCopy(to + r * cache.strides[2] * item, from + r * rows.strides[1] * item, run_bytes);
    }
  });
}

}  // namespace

std::span<const std::int64_t> require_slots(std::string_view op,
                                            const ConstTensorView& slot_mapping,
                                            std::int64_t num_rows, std::int64_t capacity) {
  const check::Where where{op, "slot_mapping"};
  const auto slots = check::i64_array(where, slot_mapping, -1);
  check::require(
      static_cast<std::int64_t>(slots.size()) <= num_rows, where,
      [&] { return fmt::format("at most {} entries, one a row", num_rows); }, slots.size());
  for (std::size_t t = 0; t < slots.size(); ++t) {
    check::require(
        slots[t] < capacity, where,
        [&] { return fmt::format("slots below {}, the capacity of the cache", capacity); },
        [&] { return fmt::format("{} at index {}", slots[t], t); });
  }
  return slots;
}

void require_rows(std::string_view op, std::string_view name, const ConstTensorView& rows,
                  std::initializer_list<DType> dtypes) {
  check::tensor({op, name}, rows, 3, dtypes);
  check::unit_last_stride({op, name}, rows);
}

void require_cache(std::string_view op, std::string_view name, const TensorView& cache,
                   const ConstTensorView& rows, std::initializer_list<DType> dtypes) {
  const check::Where where{op, name};
  check::tensor(where, cache, 4, dtypes);
  check::shape(where, cache, {-1, -1, rows.shape[1], rows.shape[2]});
  check::unit_last_stride(where, cache);
  check::distinct_elements(where, cache);
}

void copy(std::span<const Target> targets, std::span<const std::int64_t> slots,
          Executor* executor) {
  std::int64_t bytes = 0;
  for (const Target& t : targets) {
    bytes += static_cast<std::int64_t>(slots.size()) * t.rows.shape[1] * t.rows.shape[2] *
             static_cast<std::int64_t>(size_of(t.rows.dtype));
  }
  if (bytes == 0) return;
  const std::int64_t heads = targets.front().rows.shape[1];
  const bool stream = bytes >= kStreamBytes;
  run(targets.size(), heads, bytes < kParallelBytes, executor,
      [&](std::size_t i, std::int64_t head_begin, std::int64_t head_end) {
        if (!stream) {
          copy_heads<copy_cached>(targets[i], slots, head_begin, head_end);
        } else {
          copy_heads<cpu::stream_copy>(targets[i], slots, head_begin, head_end);
          cpu::stream_fence();
        }
      });
}

}  // namespace attend::cache_rows
