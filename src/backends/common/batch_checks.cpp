// SPDX-License-Identifier: Apache-2.0
#include "backends/common/batch_checks.h"

#include <fmt/format.h>

#include <utility>

namespace attend {

/// Checks the form of a table for requests of these lengths; the op, which reads the block ids,
/// checks those.
void check_block_table(std::string_view op, const ConstTensorView& table,
                       std::span<const std::int32_t> seq_lens, int block_size) {
  if (seq_lens.empty()) return;
  const check::Where where{op, "block_table"};
  check::tensor(where, table, 2, {DType::i32});
  check::unit_last_stride(where, table);
  const std::int64_t longest = *std::max_element(seq_lens.begin(), seq_lens.end());
  const std::int64_t width = (longest + block_size - 1) / block_size;
  check::require(
      std::cmp_greater_equal(table.shape[0], seq_lens.size()) && table.shape[1] >= width, where,
      [&] {
        return fmt::format(
            "at least {} rows and {} columns (the longest request has {} keys in "
            "blocks of {})",
            seq_lens.size(), width, longest, block_size);
      },
      [&] { return describe(table); });
}

/// The first `num_rows` slots, or none; each -1 or a row of the cache.
std::span<const std::int64_t> checked_slots(check::Where where, std::span<const std::int64_t> slots,
                                            int num_rows, const KvCacheSpec& cache) {
  if (slots.empty()) return {};
  const auto count = static_cast<std::size_t>(num_rows);
  check::require(
      slots.size() >= count, where,
      [&] { return fmt::format("none or at least {} entries", count); }, slots.size());
  const std::int64_t capacity = cache.num_blocks * cache.block_size;
  for (std::size_t i = 0; i < count; ++i) {
    check::require(
        slots[i] >= -1 && slots[i] < capacity, where,
        [&] { return fmt::format("slots from -1 to {}", capacity - 1); },
        [&] { return fmt::format("{} at index {}", slots[i], i); });
  }
  return slots.first(count);
}

}  // namespace attend
