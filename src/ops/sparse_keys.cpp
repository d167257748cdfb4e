// SPDX-License-Identifier: Apache-2.0
#include "ops/sparse_keys.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>

#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/mla_rows.h"

namespace attend::ops {
namespace {

/// Rows as multiples of one distance, which may be smaller than a row: slot s begins at
/// pitch * (s / block_size * per_block + s % block_size * per_token) elements.
struct RowGrid {
  std::int64_t pitch, per_block, per_token;
};

RowGrid row_grid(const ConstTensorView& cache) noexcept {
  // A stride that nothing is multiplied by may be any number.
  const std::int64_t block = cache.shape[0] > 1 ? cache.strides[0] : 0;
  const std::int64_t token = cache.shape[1] > 1 ? mla_rows::row_stride(cache) : 0;
  const std::int64_t pitch = std::max<std::int64_t>(1, std::gcd(block, token));
  return {pitch, block / pitch, token / pitch};
}

/// Reads the indices of one token.
class RowNames {
 public:
  explicit RowNames(const ConstTensorView& cache) noexcept
      : grid_(row_grid(cache)),
        block_size_(cache.shape[1]),
        capacity_(cache.shape[0] * block_size_),
        even_(grid_.per_block == block_size_ * grid_.per_token) {}

  /// Returns how many of `count` indices name a row; those go to `to`.
  std::int32_t compact(const std::int32_t* indices, std::int64_t count,
                       std::int32_t* to) const noexcept {
    std::int32_t valid = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t slot = indices[i];
      if (slot < 0 || slot >= capacity_) continue;
      const std::int64_t row =
          even_ ? slot * grid_.per_token
                : slot / block_size_ * grid_.per_block + slot % block_size_ * grid_.per_token;
      to[valid++] = static_cast<std::int32_t>(row);
    }
    return valid;
  }

 private:
  RowGrid grid_;
  std::int64_t block_size_, capacity_;
  bool even_;
};

}  // namespace

void check_sparse_keys(std::string_view op, const SparseKeys& keys, std::int64_t num_tokens) {
  const check::Where indices{op, keys.indices_name}, lengths{op, keys.lengths_name};
  check::tensor(indices, keys.indices, 2, {DType::i32});
  check::shape(indices, keys.indices, {num_tokens, -1});
  check::require(keys.indices.shape[1] >= 1 && keys.indices.shape[1] <= (1 << 30), indices,
                 "from 1 to 2^30 indices a token", keys.indices.shape[1]);
  check::unit_last_stride(indices, keys.indices);
  if (keys.lengths.defined()) {
    check::tensor(lengths, keys.lengths, 1, {DType::i32});
    check::shape(lengths, keys.lengths, {num_tokens});
  }
  const RowGrid grid = row_grid(keys.cache);
  const std::int64_t last =
      std::max<std::int64_t>(0, keys.cache.shape[0] - 1) * std::abs(grid.per_block) +
      std::max<std::int64_t>(0, keys.cache.shape[1] - 1) * std::abs(grid.per_token);
  check::require(
      keys.cache.shape[1] >= 1 && last <= std::numeric_limits<std::int32_t>::max(),
      {op, keys.cache_name},
      "blocks of at least 1 row, the last row within 2^31 times the largest distance that divides "
      "both strides",
      [&] { return describe(keys.cache); });
}

std::size_t sparse_table_bytes(std::int64_t num_tokens, std::int64_t topk) noexcept {
  return static_cast<std::size_t>(num_tokens * (topk + 1)) * sizeof(std::int32_t);
}

void place_sparse_keys(cpu::AttentionProblem& p, const SparseKeys& keys, std::int32_t* memory,
                       Executor& executor) {
  const std::int64_t num_tokens = keys.indices.shape[0], topk = keys.indices.shape[1];
  std::int32_t* counts = memory;
  std::int32_t* table = memory + num_tokens;
  const RowNames names(keys.cache);
  const auto compact = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      std::int64_t length = topk;
      if (keys.lengths.defined())
        length = std::clamp<std::int64_t>(
            keys.lengths.as<std::int32_t>()[t * keys.lengths.strides[0]], 0, topk);
      counts[t] = names.compact(keys.indices.as<std::int32_t>() + t * keys.indices.strides[0],
                                length, table + t * topk);
    }
  };
  // Below that starting the workers takes longer than the work.
  constexpr std::int64_t kSerialIndices = 16384;
  const std::int64_t n = executor.num_workers();
  if (n == 1 || num_tokens * topk <= kSerialIndices) {
    compact(0, num_tokens);
  } else {
    executor.run(
        [&](int worker) { compact(num_tokens * worker / n, num_tokens * (worker + 1) / n); });
  }
  p.seq_lens = counts;
  p.k_dtype = p.v_dtype = keys.cache.dtype;
  p.k = p.v = keys.cache.data;
  p.values_in_keys = true;
  p.coded = coded_rows(keys.cache);
  p.block_table = table;
  p.block_table_stride = topk;
  p.block_size = 1;
  p.k_strides = p.v_strides = {row_grid(keys.cache).pitch, 0, 0};
}

}  // namespace attend::ops
