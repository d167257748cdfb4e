// SPDX-License-Identifier: Apache-2.0
// Indices are untrusted: whatever they are, nothing outside of a cache is read, and rows that no
// valid index names, here NaN, do not show. Caches end where their memory ends, so that the address
// sanitizer sees what the results would not.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attend/ops/flash_mla.h"
#include "attend/ops/sparse_index.h"
#include "sparse_batch.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

constexpr std::int32_t kLowest = std::numeric_limits<std::int32_t>::min(),
                       kHighest = std::numeric_limits<std::int32_t>::max();

/// Any bits, or numbers at the edges of what is valid.
std::int32_t hostile(Rng& rng, std::int32_t capacity) {
  const std::int32_t edges[] = {kLowest, kLowest + 1, kHighest,     kHighest - 1, -1,     0,
                                -64,     capacity,    capacity - 1, capacity + 1, 1 << 20};
  if (rng.chance(0.4)) return rng.pick(edges);
  const std::int64_t near = std::int64_t{2} * capacity;
  return static_cast<std::int32_t>(rng.chance(0.5) ? rng.integer(-near, near)
                                                   : rng.integer(kLowest, kHighest));
}

/// Batches of all kinds of caches in which some rows are keys and the others NaN.
struct Target {
  Target(DType dtype, DType cache, int dim, int block_size)
      : batch(
            [&] {
              LatentOptions o;
              o.dtype = dtype;
              o.cache = cache;
              o.dim = dim;
              o.heads = 3;
              o.block_size = block_size;
              o.causal = false;
              return o;
            }(),
            {{0, 70, 1}, {1, 5, 1}, {2, 128, 1}, {3, 1, 1}}),
        sparse(batch, 96) {}

  std::int32_t capacity() const {
    return static_cast<std::int32_t>(batch.cache.view().shape[0] * batch.cache.view().shape[1]);
  }
  /// Slots that hold keys.
  std::vector<std::int32_t> keys() const {
    std::vector<std::int32_t> slots;
    for (std::size_t r = 0; r < batch.requests.size(); ++r) {
      const auto* table =
          batch.block_table.view().select(0, static_cast<std::int64_t>(r)).as<std::int32_t>();
      for (int p = 0; p < batch.requests[r].keys; ++p)
        slots.push_back(table[p / batch.options.block_size] * batch.options.block_size +
                        p % batch.options.block_size);
    }
    return slots;
  }
  /// Hostile indices, but slots of keys in place of those that would name rows of NaN; gives the
  /// valid ones of each token.
  std::vector<std::vector<std::int32_t>> name(Rng& rng, const TensorView& indices) const {
    const std::vector<std::int32_t> good = keys();
    std::vector<std::vector<std::int32_t>> named;
    for (std::int64_t t = 0; t < indices.shape[0]; ++t) {
      auto* row = indices.select(0, t).as<std::int32_t>();
      named.emplace_back();
      for (std::int64_t i = 0; i < indices.shape[1]; ++i) {
        row[i] = hostile(rng, capacity());
        if (row[i] < 0 || row[i] >= capacity()) continue;
        row[i] = rng.pick(good);
        named.back().push_back(row[i]);
      }
    }
    return named;
  }

  LatentBatch batch;
  SparseBatch sparse;
};

const struct {
  DType dtype, cache;
  int dim, block_size;
} kCaches[] = {{DType::bf16, DType::bf16, 576, 64},
               {DType::f32, DType::f32, 512, 16},
               {DType::bf16, DType::fp8_e4m3, 576, 1},
               {DType::bf16, DType::u8, 576, 64},
               {DType::bf16, DType::u8, 512, 64}};

/// The rows of the same call with the valid indices alone.
LatentBatch::Rows of_valid_ones(Target& target, const std::vector<std::vector<std::int32_t>>& named,
                                IsaLevel level) {
  const TensorView indices = target.sparse.indices;
  const std::vector<unsigned char> kept = target.sparse.indices.snapshot();
  for (std::size_t t = 0; t < named.size(); ++t) {
    auto* row = indices.select(0, static_cast<std::int64_t>(t)).as<std::int32_t>();
    std::fill_n(row, indices.shape[1], -1);
    std::ranges::copy(named[t], row);
  }
  LatentBatch::Rows rows = target.sparse.run(nullptr, level);
  std::memcpy(indices.data, kept.data(), kept.size());
  return rows;
}

class HostileIndices : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(HostileIndices, OfSparseMlaAttentionAreAsIfTheyWereNotThere) {
  Rng rng(21);
  SCOPED_TRACE(rng.trace());
  for (const auto& c : kCaches) {
    Target target(c.dtype, c.cache, c.dim, c.block_size);
    for (int round = 0; round < scaled(12, 2); ++round) {
      const auto named = target.name(rng, target.sparse.indices);
      const LatentBatch::Rows wanted = of_valid_ones(target, named, GetParam());
      EXPECT_EQ(target.sparse.run(nullptr, GetParam()), wanted);
      for (std::int64_t t = 0; t < 4; ++t)
        EXPECT_FALSE(std::isnan(get(target.batch.out, {t, 1, 3})) ||
                     std::isnan(get(target.batch.lse, {t, 2})));
    }
  }
}

TEST_P(HostileIndices, OfFlashMlaWithKvcacheAreAsIfTheyWereNotThere) {
  Rng rng(22);
  SCOPED_TRACE(rng.trace());
  for (const auto& c : kCaches) {
    if (c.block_size != 64) continue;
    Target target(c.dtype, c.cache, c.dim, c.block_size);
    HostTensor lse(DType::f32, {4, 3, 1}), more(DType::i32, {4, 1, 40}), lengths(DType::i32, {4});
    const TensorView cache = target.batch.cache;
    FlashMlaWithKvCacheArgs a;
    a.q = {target.batch.q.view().data, c.dtype, {4, 1, 3, c.dim}};
    a.k_cache = {cache.data, cache.dtype, {cache.shape[0], 64, 1, cache.shape[2]}};
    a.is_fp8_kvcache = cache.dtype == DType::u8;
    a.indices = {target.sparse.indices.view().data, DType::i32, {4, 1, 96}};
    a.softmax_scale = target.sparse.args().scale;
    a.out = {target.batch.out.view().data, c.dtype, {4, 1, 3, 512}};
    a.lse = lse;
    for (int round = 0; round < scaled(12, 2); ++round) {
      a.extra_k_cache = a.extra_indices = a.extra_topk_length = {};
      const auto named = target.name(rng, target.sparse.indices);
      const LatentBatch::Rows wanted = of_valid_ones(target, named, GetParam());
      target.batch.out.fill_bytes(0xff);
      flash_mla_with_kvcache(a, nullptr, GetParam());
      for (const auto& [key, row] : target.batch.rows())
        EXPECT_TRUE(std::equal(row.begin(), row.begin() + 3 * 512, wanted.at(key).begin()));
      // The same indices, and hostile lengths, in a second cache.
      target.name(rng, {more.view().data, DType::i32, {4, 40}});
      for (std::int32_t& n : lengths.as<std::int32_t>()) n = hostile(rng, 40);
      a.extra_k_cache = a.k_cache;
      a.extra_indices = more;
      a.extra_topk_length = lengths;
      target.batch.out.fill_bytes(0xff);
      flash_mla_with_kvcache(a, nullptr, GetParam());
      for (std::int64_t t = 0; t < 4; ++t)
        EXPECT_FALSE(std::isnan(get(target.batch.out, {t, 1, 3})) ||
                     std::isnan(get(lse, {t, 2, 0})));
    }
  }
}

TEST_P(HostileIndices, OfFlashMlaSparseFwdAreAsIfTheyWereNotThere) {
  Rng rng(23);
  SCOPED_TRACE(rng.trace());
  for (const DType dtype : {DType::bf16, DType::f32}) {
    Target target(dtype, dtype, 576, 1);
    HostTensor lengths(DType::i32, {4});
    const SparseMlaArgs s = target.sparse.args();
    FlashMlaSparseFwdArgs a;
    a.q = s.q;
    a.kv = s.kv_cache;
    a.indices = {s.indices.data, DType::i32, {4, 1, 96}};
    a.sm_scale = *s.scale;
    a.out = s.out;
    a.max_logits = s.max_logits;
    a.lse = s.lse;
    for (int round = 0; round < scaled(12, 2); ++round) {
      const auto named = target.name(rng, target.sparse.indices);
      of_valid_ones(target, named, GetParam());
      const auto wanted = target.batch.out.snapshot();
      target.batch.out.fill_bytes(0xff);
      a.topk_length = {};
      flash_mla_sparse_fwd(a, nullptr, GetParam());
      EXPECT_EQ(target.batch.out.snapshot(), wanted);
      for (std::int32_t& n : lengths.as<std::int32_t>()) n = hostile(rng, 96);
      a.topk_length = lengths;
      flash_mla_sparse_fwd(a, nullptr, GetParam());
      for (std::int64_t t = 0; t < 4; ++t)
        EXPECT_FALSE(std::isnan(get(target.batch.out, {t, 1, 3})));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, HostileIndices, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

// Requests, tokens, blocks of the table, workspace ids and starts: all any bits.
TEST(HostileTables, ConvertToRowsOfTheCacheOrToNone) {
  Rng rng(24);
  SCOPED_TRACE(rng.trace());
  constexpr std::int64_t kTokens = 9, kTopk = 33, kReqs = 4, kWidth = 6, kStarts = 3;
  HostTensor req_id(DType::i32, {kTokens}), table(DType::i32, {kReqs, kWidth}),
      tokens(DType::i32, {kTokens, kTopk}), out(DType::i32, {kTokens, kTopk}),
      counts(DType::i32, {kTokens}), ids(DType::i32, {kTokens}), starts(DType::i32, {kStarts});
  for (int round = 0; round < scaled(400, 40); ++round) {
    ConvertReqIndexToGlobalIndexArgs a;
    a.pages.num_blocks = rng.integer(0, 40);
    a.pages.block_size = static_cast<int>(rng.integer(1, 70));
    a.pages.block_stride_rows = rng.chance(0.3) ? a.pages.block_size + 5 : 0;
    a.workspace_rows = rng.integer(0, 500);
    for (std::int32_t& x : req_id.as<std::int32_t>()) x = hostile(rng, kReqs);
    for (std::int32_t& x : table.as<std::int32_t>())
      x = hostile(rng, static_cast<std::int32_t>(a.pages.num_blocks));
    for (std::int32_t& x : tokens.as<std::int32_t>())
      x = hostile(rng, static_cast<std::int32_t>(kWidth) * a.pages.block_size);
    for (std::int32_t& x : ids.as<std::int32_t>()) x = hostile(rng, kStarts);
    for (std::int32_t& x : starts.as<std::int32_t>())
      x = hostile(rng, static_cast<std::int32_t>(a.workspace_rows));
    a.req_id = req_id;
    a.pages.block_table = table;
    a.token_indices = tokens;
    a.out = out;
    a.valid_counts = counts;
    const bool workspace = rng.chance(0.5);
    if (workspace) {
      a.prefill_workspace_request_ids = ids;
      a.prefill_workspace_starts = starts;
    }
    out.fill_bytes(0x5a);
    convert_req_index_to_global_index(a);
    const std::int64_t stride =
        a.pages.block_stride_rows > 0 ? a.pages.block_stride_rows : a.pages.block_size;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      std::int32_t valid = 0;
      const auto* row = out.view().select(0, t).as<std::int32_t>();
      const bool in_workspace =
          workspace && ids.as<std::int32_t>()[static_cast<std::size_t>(t)] >= 0;
      for (std::int64_t i = 0; i < kTopk; ++i) {
        valid += row[i] != -1 ? 1 : 0;
        if (row[i] == -1) continue;
        ASSERT_GE(row[i], 0);
        if (in_workspace) {
          ASSERT_LT(row[i], a.workspace_rows);
        } else {
          ASSERT_LT(row[i] / stride, a.pages.num_blocks);
          ASSERT_LT(row[i] % stride, a.pages.block_size);
        }
      }
      ASSERT_EQ(counts.as<std::int32_t>()[static_cast<std::size_t>(t)], valid);
    }
  }
}

}  // namespace
}  // namespace attend::testing
