// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "attend/ops/cache.h"
#include "core/check.h"
#include "kernels/cpu/copy/stream_copy.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "reshape_and_cache_flash";

// Waking the workers costs as much as copying this much alone.
constexpr std::int64_t kParallelBytes = 256 << 10;

// More than the private caches of a few cores: the rows would leave them before attention reads
// them.
constexpr std::int64_t kStreamBytes = 8 << 20;

void require_rows(std::string_view name, const ConstTensorView& rows) {
  check::tensor({kOp, name}, rows, 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride({kOp, name}, rows);
}

void require_cache(std::string_view name, const TensorView& cache, const ConstTensorView& rows) {
  const check::Where where{kOp, name};
  check::tensor(where, cache, 4, {rows.dtype});
  check::shape(where, cache, {-1, -1, rows.shape[1], rows.shape[2]});
  check::unit_last_stride(where, cache);
  check::distinct_elements(where, cache);
}

std::span<const std::int64_t> validate(const ReshapeAndCacheFlashArgs& a) {
  require_rows("key", a.key);
  require_rows("value", a.value);
  check::require(
      a.value.dtype == a.key.dtype, {kOp, "value"},
      [&] { return fmt::format("dtype {} of key", to_string(a.key.dtype)); },
      [&] { return describe(a.value); });
  check::shape({kOp, "value"}, a.value, {a.key.shape[0], a.key.shape[1], -1});
  require_cache("key_cache", a.key_cache, a.key);
  require_cache("value_cache", a.value_cache, a.value);
  check::shape({kOp, "value_cache"}, a.value_cache,
               {a.key_cache.shape[0], a.key_cache.shape[1], -1, -1});

  const auto slots = check::i64_array({kOp, "slot_mapping"}, a.slot_mapping, -1);
  check::require(
      static_cast<std::int64_t>(slots.size()) <= a.key.shape[0], {kOp, "slot_mapping"},
      [&] { return fmt::format("at most {} entries, the rows of key", a.key.shape[0]); },
      slots.size());
  const std::int64_t capacity = a.key_cache.shape[0] * a.key_cache.shape[1];
  for (std::size_t t = 0; t < slots.size(); ++t) {
    check::require(
        slots[t] < capacity, {kOp, "slot_mapping"},
        [&] { return fmt::format("slots below {}, the capacity of the cache", capacity); },
        [&] { return fmt::format("{} at index {}", slots[t], t); });
  }

  check::no_overlap({kOp, "value_cache"}, a.value_cache, "key_cache", a.key_cache);
  const auto apart_from_inputs = [&](std::string_view name, const TensorView& cache) {
    check::no_overlap({kOp, name}, cache, "key", a.key);
    check::no_overlap({kOp, name}, cache, "value", a.value);
    check::no_overlap({kOp, name}, cache, "slot_mapping", a.slot_mapping);
  };
  apart_from_inputs("key_cache", a.key_cache);
  apart_from_inputs("value_cache", a.value_cache);
  return slots;
}

void copy_cached(std::byte* dst, const std::byte* src, std::size_t bytes) noexcept {
  std::memcpy(dst, src, bytes);
}

// Copies heads [head_begin, head_end) of every row.
template <auto kCopy>
void write_heads(const ConstTensorView& rows, const TensorView& cache,
                 std::span<const std::int64_t> slots, std::int64_t head_begin,
                 std::int64_t head_end) noexcept {
  const auto item = static_cast<std::int64_t>(size_of(rows.dtype));
  const std::int64_t head_elements = rows.shape[2];
  const std::int64_t block_size = cache.shape[1];
  // In NHD the heads of a row are one run of bytes on both sides.
  const bool one_run = rows.strides[1] == head_elements && cache.strides[2] == head_elements;
  const std::int64_t runs = one_run ? 1 : head_end - head_begin;
  const auto run_bytes =
      static_cast<std::size_t>(head_elements * item * (one_run ? head_end - head_begin : 1));
  const auto* src = rows.as<std::byte>() + head_begin * rows.strides[1] * item;
  auto* dst = cache.as<std::byte>() + head_begin * cache.strides[2] * item;

  for (std::size_t t = 0; t < slots.size(); ++t) {
    if (slots[t] < 0) continue;
    const std::int64_t block = slots[t] / block_size;
    const std::int64_t offset = slots[t] % block_size;
    const auto* from = src + static_cast<std::int64_t>(t) * rows.strides[0] * item;
    auto* to = dst + (block * cache.strides[0] + offset * cache.strides[1]) * item;
    for (std::int64_t r = 0; r < runs; ++r) {
      kCopy(to + r * cache.strides[2] * item, from + r * rows.strides[1] * item, run_bytes);
    }
  }
}

// Writes part `part` of `parts`. Work is cut along (cache, head), never along rows: each worker
// walks all rows in order and no two workers touch the same bytes, so that the later of two rows
// with one slot wins as in a serial loop.
template <auto kCopy>
void write_part(const ReshapeAndCacheFlashArgs& a, std::span<const std::int64_t> slots,
                std::int64_t part, std::int64_t parts) noexcept {
  const std::int64_t heads = a.key.shape[1];
  const std::int64_t begin = 2 * heads * part / parts;
  const std::int64_t end = 2 * heads * (part + 1) / parts;
  if (begin < heads) {
    write_heads<kCopy>(a.key, a.key_cache, slots, begin, std::min(end, heads));
  }
  if (end > heads) {
    write_heads<kCopy>(a.value, a.value_cache, slots, std::max(begin, heads) - heads, end - heads);
  }
}

}  // namespace

void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& a, Executor* executor) {
  const auto slots = validate(a);
  const std::int64_t row_bytes = a.key.shape[1] * (a.key.shape[2] + a.value.shape[2]) *
                                 static_cast<std::int64_t>(size_of(a.key.dtype));
  const std::int64_t bytes = static_cast<std::int64_t>(slots.size()) * row_bytes;
  if (bytes == 0) return;
  if (bytes < kParallelBytes) {
    write_part<copy_cached>(a, slots, 0, 1);
    return;
  }
  Executor& workers = executor != nullptr ? *executor : default_executor();
  workers.run([&](int worker) {
    if (bytes < kStreamBytes) {
      write_part<copy_cached>(a, slots, worker, workers.num_workers());
    } else {
      write_part<cpu::stream_copy>(a, slots, worker, workers.num_workers());
      cpu::stream_fence();
    }
  });
}

}  // namespace attend
