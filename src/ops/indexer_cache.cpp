// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/indexer_cache.h"

#include <algorithm>
#include <cstring>

#include "attend/core/float_types.h"
#include "core/check.h"
#include "ops/cache_rows.h"
#include "ops/indexer_encode.h"
#include "ops/mla_rows.h"

namespace attend {
namespace {

using indexer_cache::kDim, indexer_cache::kRowBytes;

constexpr float kSmallestAmax = 1e-4F;

void require_cache(std::string_view op, const ConstTensorView& cache) {
  const check::Where where{op, "kv_cache"};
  check::tensor(where, cache, 3, {DType::u8});
  check::shape(where, cache, {-1, -1, kRowBytes});
  check::unit_last_stride(where, cache);
  check::require(
      cache.shape[1] <= 1 || cache.strides[1] == kRowBytes, where, "blocks without gaps",
      [&] { return fmt::format("stride {} between rows of 132 bytes", cache.strides[1]); });
}

template <typename T>
void write_keys(const IndexerKQuantAndCacheArgs& a, std::span<const std::int64_t> slots,
                Executor* executor) {
  const std::int64_t block_size = a.kv_cache.shape[1];
  const bool small = static_cast<std::int64_t>(slots.size()) * kDim < mla_rows::kParallelElements;
  mla_rows::run(small, executor, [&](int worker, int workers) {
    for (std::size_t t = 0; t < slots.size(); ++t) {
      // Cut by slots: whoever writes a slot walks the rows in order, so that the later one wins.
      if (slots[t] < 0 || slots[t] % workers != worker) continue;
      std::uint8_t* block =
          a.kv_cache.as<std::uint8_t>() + slots[t] / block_size * a.kv_cache.strides[0];
      const std::int64_t offset = slots[t] % block_size;
      const float scale = ops::encode_indexer_row(
          a.k.as<T>() + static_cast<std::int64_t>(t) * a.k.strides[0], {a.scale_fmt, kSmallestAmax},
          block + indexer_cache::codes_at(offset));
      std::memcpy(block + indexer_cache::scale_at(block_size, offset), &scale, sizeof scale);
    }
  });
}

constexpr std::string_view kGather = "cp_gather_indexer_k_quant_cache";

void require_results(const CpGatherIndexerKQuantCacheArgs& a) {
  const check::Where keys{kGather, "dst_k"}, scales{kGather, "dst_scale"};
  check::tensor(keys, a.dst_k, 2, {DType::fp8_e4m3});
  check::shape(keys, a.dst_k, {-1, kDim});
  check::unit_last_stride(keys, a.dst_k);
  check::distinct_elements(keys, a.dst_k);
  check::tensor(scales, a.dst_scale, 1, {DType::f32});
  check::shape(scales, a.dst_scale, {a.dst_k.shape[0]});
  check::contiguous(scales, a.dst_scale);
  check::no_overlap(keys, a.dst_k, "dst_scale", a.dst_scale);
  const auto apart = [&](std::string_view name, const ConstTensorView& input) {
    check::no_overlap(keys, a.dst_k, name, input);
    check::no_overlap(scales, a.dst_scale, name, input);
  };
  apart("kv_cache", a.kv_cache);
  apart("block_table", a.block_table);
  apart("cu_seq_lens", a.cu_seq_lens);
}

// The first row of each request and the end of the last one.
std::span<const std::int32_t> require_lengths(const CpGatherIndexerKQuantCacheArgs& a) {
  const check::Where where{kGather, "cu_seq_lens"};
  const auto cu = check::i32_array(where, a.cu_seq_lens, -1);
  check::require(!cu.empty() && cu[0] == 0, where, "entries from 0 on, one more than requests",
                 [&] { return cu.empty() ? "none" : fmt::format("{} at index 0", cu[0]); });
  for (std::size_t r = 1; r < cu.size(); ++r) {
    check::require(cu[r - 1] <= cu[r], where, "ascending entries",
                   [&] { return fmt::format("{} then {} at index {}", cu[r - 1], cu[r], r); });
  }
  check::require(
      cu.back() <= a.dst_k.shape[0], where,
      [&] { return fmt::format("at most {} rows, those of dst_k", a.dst_k.shape[0]); }, cu.back());
  return cu;
}

const std::int32_t* blocks_of(const ConstTensorView& table, std::size_t request) noexcept {
  return table.as<std::int32_t>() + static_cast<std::int64_t>(request) * table.strides[0];
}

void require_blocks(const CpGatherIndexerKQuantCacheArgs& a, std::span<const std::int32_t> cu) {
  const check::Where where{kGather, "block_table"};
  check::tensor(where, a.block_table, 2, {DType::i32});
  check::shape(where, a.block_table, {static_cast<std::int64_t>(cu.size()) - 1, -1});
  check::unit_last_stride(where, a.block_table);
  const std::int64_t num_blocks = a.kv_cache.shape[0], block_size = a.kv_cache.shape[1];
  check::require(cu.back() == 0 || block_size >= 1, {kGather, "kv_cache"},
                 "blocks of at least one token", [&] { return describe(a.kv_cache); });
  for (std::size_t r = 0; r + 1 < cu.size(); ++r) {
    if (cu[r] == cu[r + 1]) continue;
    const std::int64_t needed = (cu[r + 1] - cu[r] - 1) / block_size + 1;
    check::require(
        needed <= a.block_table.shape[1], where,
        [&] { return fmt::format("{} blocks or more for request {}", needed, r); },
        [&] { return describe(a.block_table); });
    for (std::int64_t b = 0; b < needed; ++b) {
      const std::int32_t block = blocks_of(a.block_table, r)[b];
      check::require(
          block >= 0 && block < num_blocks, where,
          [&] { return fmt::format("block ids in [0, {}) at [{}, {}]", num_blocks, r, b); }, block);
    }
  }
}

// Rows [begin, end) of the results, as many at once as lie in one block.
void gather_rows(const CpGatherIndexerKQuantCacheArgs& a, std::span<const std::int32_t> cu,
                 std::int64_t begin, std::int64_t end) {
  if (begin >= end) return;
  const std::int64_t block_size = a.kv_cache.shape[1];
  auto r = static_cast<std::size_t>(std::ranges::upper_bound(cu, begin) - cu.begin() - 1);
  for (std::int64_t row = begin; row < end; ++r) {
    const std::int64_t request_end = std::min<std::int64_t>(cu[r + 1], end);
    while (row < request_end) {
      const std::int64_t token = row - cu[r], offset = token % block_size;
      const std::int64_t rows = std::min(block_size - offset, request_end - row);
      const std::uint8_t* block =
          a.kv_cache.as<std::uint8_t>() +
          blocks_of(a.block_table, r)[token / block_size] * a.kv_cache.strides[0];
      for (std::int64_t i = 0; i < rows; ++i) {
        std::memcpy(a.dst_k.as<std::uint8_t>() + (row + i) * a.dst_k.strides[0],
                    block + indexer_cache::codes_at(offset + i), kDim);
      }
      std::memcpy(a.dst_scale.as<float>() + row,
                  block + indexer_cache::scale_at(block_size, offset),
                  static_cast<std::size_t>(rows) * sizeof(float));
      row += rows;
    }
  }
}

}  // namespace

void indexer_k_quant_and_cache(const IndexerKQuantAndCacheArgs& a, Executor* executor) {
  constexpr std::string_view kOp = "indexer_k_quant_and_cache";
  const check::Where keys{kOp, "k"}, cache{kOp, "kv_cache"};
  check::tensor(keys, a.k, 2, {DType::f32, DType::f16, DType::bf16});
  check::shape(keys, a.k, {-1, kDim});
  check::unit_last_stride(keys, a.k);
  require_cache(kOp, a.kv_cache);
  check::distinct_elements(cache, a.kv_cache);
  check::require(a.scale_fmt == IndexerScale::unrounded || a.scale_fmt == IndexerScale::ue8m0,
                 {kOp, "scale_fmt"}, "unrounded or ue8m0", static_cast<int>(a.scale_fmt));
  check::no_overlap(cache, a.kv_cache, "k", a.k);
  check::no_overlap(cache, a.kv_cache, "slot_mapping", a.slot_mapping);
  const auto slots = cache_rows::require_slots(kOp, a.slot_mapping, a.k.shape[0],
                                               a.kv_cache.shape[0] * a.kv_cache.shape[1]);
  switch (a.k.dtype) {
    case DType::f32:
      return write_keys<float>(a, slots, executor);
    case DType::f16:
      return write_keys<f16>(a, slots, executor);
    default:
      return write_keys<bf16>(a, slots, executor);
  }
}

void cp_gather_indexer_k_quant_cache(const CpGatherIndexerKQuantCacheArgs& a, Executor* executor) {
  require_cache(kGather, a.kv_cache);
  require_results(a);
  const auto cu = require_lengths(a);
  require_blocks(a, cu);
  const std::int64_t rows = cu.back();
  if (rows == 0) return;
  mla_rows::run(rows * kRowBytes <= mla_rows::kParallelCopyBytes, executor,
                [&](int worker, int workers) {
                  gather_rows(a, cu, rows * worker / workers, rows * (worker + 1) / workers);
                });
}

}  // namespace attend
