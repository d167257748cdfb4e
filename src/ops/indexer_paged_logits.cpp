// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <vector>

#include "attend/ops/indexer_cache.h"
#include "attend/ops/indexer_logits.h"
#include "core/check.h"
#include "ops/indexer_run.h"
#include "ops/indexer_schedule.h"
#include "ops/isa_choice.h"

namespace attend {
namespace {

using ops::ContextLens;

constexpr std::string_view kOp = "fp8_paged_mqa_logits";

/// The cache as [num_blocks, block_size, 132].
ConstTensorView checked_cache(const ConstTensorView& given) {
  const check::Where where{kOp, "kv_cache"};
  check::tensor(where, given, given.rank == 4 ? 4 : 3, {DType::u8});
  if (given.rank == 4) check::shape(where, given, {-1, -1, 1, indexer_cache::kRowBytes});
  const ConstTensorView cache = given.rank == 4 ? given.select(2, 0) : given;
  check::shape(where, cache, {-1, -1, indexer_cache::kRowBytes});
  check::unit_last_stride(where, cache);
  check::require(cache.shape[1] <= 1 || cache.strides[1] == indexer_cache::kRowBytes, where,
                 "blocks without gaps", [&] {
                   return fmt::format("stride {} between rows of 132 bytes", cache.strides[1]);
                 });
  return cache;
}

void check_tensors(const Fp8PagedMqaLogitsArgs& a) {
  const check::Where result{kOp, "logits"};
  check::tensor({kOp, "q"}, a.q, 4, {DType::fp8_e4m3});
  check::shape({kOp, "q"}, a.q, {-1, -1, -1, cpu::kIndexerDim});
  check::unit_last_stride({kOp, "q"}, a.q);
  check::require(a.q.shape[1] >= 1, {kOp, "q"}, "at least 1 token a request",
                 [&] { return describe(a.q); });
  ops::check_indexer_rows(kOp, a.q, a.weights, a.logits);
  check::no_overlap(result, a.logits, "kv_cache", a.kv_cache);
  check::no_overlap(result, a.logits, "context_lens", a.context_lens);
  check::no_overlap(result, a.logits, "block_table", a.block_table);
  if (a.schedule_metadata.defined())
    check::no_overlap(result, a.logits, "schedule_metadata", a.schedule_metadata);
}

ContextLens checked_lengths(const Fp8PagedMqaLogitsArgs& a) {
  const check::Where where{kOp, "context_lens"};
  const ContextLens lens = ops::checked_context_lens(kOp, a.context_lens);
  lens.of_each_token ? check::shape(where, a.context_lens, {a.q.shape[0], a.q.shape[1]})
                     : check::shape(where, a.context_lens, {a.q.shape[0]});
  for (std::size_t i = 0; i < lens.values.size(); ++i) {
    check::require(
        lens.values[i] <= a.logits.shape[1], where,
        [&] {
          return fmt::format("lengths up to {}, max_model_len of the logits", a.logits.shape[1]);
        },
        [&] { return fmt::format("{} at index {}", lens.values[i], i); });
  }
  return lens;
}

/// How many keys query token n of a request sees.
std::int64_t visible(const ContextLens& lens, std::int64_t next_n, std::int64_t row) noexcept {
  if (lens.of_each_token) return lens.values[static_cast<std::size_t>(row)];
  const std::int64_t length = lens.values[static_cast<std::size_t>(row / next_n)];
  return std::max<std::int64_t>(length - next_n + row % next_n + 1, 0);
}

void check_blocks(const Fp8PagedMqaLogitsArgs& a, const ConstTensorView& cache,
                  const ContextLens& lens) {
  const check::Where where{kOp, "block_table"};
  check::tensor(where, a.block_table, 2, {DType::i32});
  check::shape(where, a.block_table, {a.q.shape[0], -1});
  check::unit_last_stride(where, a.block_table);
  const std::int64_t next_n = a.q.shape[1];
  for (std::int64_t b = 0; b < a.q.shape[0]; ++b) {
    std::int64_t longest = 0;
    for (std::int64_t n = 0; n < next_n; ++n)
      longest = std::max(longest, visible(lens, next_n, b * next_n + n));
    if (longest == 0) continue;
    check::require(cache.shape[1] >= 1, {kOp, "kv_cache"}, "blocks of at least one token",
                   [&] { return describe(cache); });
    const std::int64_t needed = (longest - 1) / cache.shape[1] + 1;
    check::require(
        needed <= a.block_table.shape[1], where,
        [&] { return fmt::format("{} blocks or more for request {}", needed, b); },
        [&] { return describe(a.block_table); });
    const auto* blocks = a.block_table.as<std::int32_t>() + b * a.block_table.strides[0];
    for (std::int64_t i = 0; i < needed; ++i) {
      check::require(
          blocks[i] >= 0 && blocks[i] < cache.shape[0], where,
          [&] { return fmt::format("block ids in [0, {}) at [{}, {}]", cache.shape[0], b, i); },
          blocks[i]);
    }
  }
}

/// A schedule of other lengths belongs to another batch.
void check_schedule(const Fp8PagedMqaLogitsArgs& a, const ConstTensorView& cache,
                    const ContextLens& lens) {
  const check::Where where{kOp, "schedule_metadata"};
  if (!a.schedule_metadata.defined()) return;
  check::tensor(where, a.schedule_metadata, 2, {DType::i32});
  check::shape(where, a.schedule_metadata, {-1, 2});
  check::contiguous(where, a.schedule_metadata);
  const std::int64_t parts = a.schedule_metadata.shape[0] - 1;
  check::require(parts >= 1 && parts <= (1 << 20), where, "from 2 to 2^20 rows",
                 [&] { return describe(a.schedule_metadata); });
  std::vector<std::int32_t> wanted(static_cast<std::size_t>(2 * (parts + 1)));
  ops::paged_mqa_logits_schedule(lens, std::max<std::int64_t>(cache.shape[1], 1), parts,
                                 wanted.data());
  const auto* got = a.schedule_metadata.as<std::int32_t>();
  const auto differ = std::mismatch(wanted.begin(), wanted.end(), got);
  check::require(
      differ.first == wanted.end(), where,
      "what get_paged_mqa_logits_metadata gives for context_lens and the block size",
      [&] { return fmt::format("another row {}", (differ.first - wanted.begin()) / 2); });
}

/// Keys of a request out of its blocks, as many at once as lie in one.
void find_keys(const ConstTensorView& cache, const std::int32_t* blocks,
               const ops::IndexerKeyRange& range) noexcept {
  const std::int64_t block_size = cache.shape[1];
  for (int i = 0; i < range.count;) {
    const std::int64_t token = range.begin + i, offset = token % block_size;
    const int count =
        static_cast<int>(std::min<std::int64_t>(block_size - offset, range.count - i));
    const auto* block =
        cache.as<std::uint8_t>() + std::int64_t{blocks[token / block_size]} * cache.strides[0];
    for (int j = 0; j < count; ++j) range.rows[i + j] = block + indexer_cache::codes_at(offset + j);
    std::memcpy(range.scales + i, block + indexer_cache::scale_at(block_size, offset),
                static_cast<std::size_t>(count) * sizeof(float));
    i += count;
  }
}

}  // namespace

void fp8_paged_mqa_logits(const Fp8PagedMqaLogitsArgs& a, Executor* executor,
                          std::optional<IsaLevel> isa) {
  check_tensors(a);
  const ConstTensorView cache = checked_cache(a.kv_cache);
  const ContextLens lens = checked_lengths(a);
  check_blocks(a, cache, lens);
  check_schedule(a, cache, lens);
  const cpu::IndexerKernel& kernel = cpu::indexer_kernel(ops::checked_level(kOp, isa));

  const std::int64_t next_n = a.q.shape[1];
  const auto span = [&](std::int64_t row) { return ops::KeySpan{0, visible(lens, next_n, row)}; };
  const auto find = [&](std::int64_t group, const ops::IndexerKeyRange& range) {
    find_keys(cache, a.block_table.as<std::int32_t>() + group * a.block_table.strides[0], range);
  };
  ops::run_indexer_logits({.q = a.q,
                           .weights = a.weights,
                           .logits = a.logits,
                           .clean_logits = a.clean_logits,
                           .group_rows = next_n,
                           .span = span,
                           .find = find},
                          kernel, executor);
}

}  // namespace attend
