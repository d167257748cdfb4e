// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "attend/cache/kv_cache_spec.h"
#include "attend/core/tensor_view.h"
#include "core/check.h"

/// What builders check of a batch, whatever the back end.
namespace attend {

/// Checks the form of a table for requests of these lengths; the op, which reads the block ids,
/// checks those.
void check_block_table(std::string_view op, const ConstTensorView& table,
                       std::span<const std::int32_t> seq_lens, int block_size);

/// The first `num_rows` slots, or none; each -1 or a row of the cache.
std::span<const std::int64_t> checked_slots(check::Where where, std::span<const std::int64_t> slots,
                                            int num_rows, const KvCacheSpec& cache);

/// The first `count` entries of a field that may be padded or empty.
template <typename T>
std::span<const T> first_of(const std::vector<T>& field, int count) {
  return std::span(field).first(std::min(field.size(), static_cast<std::size_t>(count)));
}

}  // namespace attend
