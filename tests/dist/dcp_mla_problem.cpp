// SPDX-License-Identifier: Apache-2.0
#include "dist/dcp_mla_problem.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "attend/oracle/mla_decode.h"

namespace attend::testing {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr float kScale = 0.11F;

std::int64_t sum(const std::vector<int>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
}

HostTensor i32_tensor(const std::vector<int>& values) {
  HostTensor t(DType::i32, {static_cast<std::int64_t>(values.size())});
  std::ranges::copy(values, t.as<std::int32_t>().begin());
  return t;
}

std::vector<int> cumulative(const std::vector<int>& lengths) {
  std::vector<int> sums{0};
  for (const int n : lengths) sums.push_back(sums.back() + n);
  return sums;
}

}  // namespace

MlaBatch::MlaBatch(const MlaBatchShape& s, Rng& rng)
    : shape(s),
      tokens(sum(s.query_lens)),
      keys(sum(s.seq_lens)),
      q(s.dtype, {tokens, s.heads, s.dim()}),
      kv_c(s.dtype, {keys, s.latent}),
      k_pe(s.dtype, {keys, s.rope}),
      kv_scale(DType::f32, {1}),
      query_start_loc(i32_tensor(cumulative(s.query_lens))),
      seq_lens(i32_tensor(s.seq_lens)),
      cu_seq_lens(i32_tensor(cumulative(s.seq_lens))) {
  q.fill_normal(rng);
  kv_c.fill_normal(rng);
  k_pe.fill_normal(rng);
  kv_scale.as<float>()[0] = 0.37F;
}

MlaRanks::MlaRanks(const MlaBatch& b, DcpLayout spread, int tokens_a_block, Rng& rng)
    : batch(&b),
      layout(spread),
      block_size(tokens_a_block),
      out(b.shape.dtype, {b.tokens, b.shape.heads, b.shape.latent}),
      lse(DType::f32, {b.tokens, b.shape.heads}),
      block_table(DType::i32, {0, 0}) {
  const std::int64_t blocks = place_blocks(rng);
  for (int rank = 0; rank < layout.world_size; ++rank) {
    cache.emplace_back(b.shape.kv_dtype,
                       std::array<std::int64_t, 3>{blocks, block_size, b.shape.row()});
    cache.back().fill_bytes(0xFF);  // NaN in every type
    fill_cache(rank);
  }
}

std::int64_t MlaRanks::used_columns(std::size_t request) const {
  const std::int64_t covered = std::int64_t{block_size} * layout.world_size;
  return (batch->shape.seq_lens[request] + covered - 1) / covered;
}

std::int64_t MlaRanks::place_blocks(Rng& rng) {
  const std::size_t requests = batch->shape.seq_lens.size();
  std::int64_t blocks = 2, columns = 0;  // some blocks stay unused
  for (std::size_t r = 0; r < requests; ++r) {
    blocks += used_columns(r);
    columns = std::max(columns, used_columns(r));
  }
  ++columns;
  std::vector<std::int32_t> free(static_cast<std::size_t>(blocks));
  std::iota(free.begin(), free.end(), 0);
  for (std::size_t i = free.size() - 1; i > 0; --i) {
    std::swap(free[i], free[static_cast<std::size_t>(rng.integer(0, static_cast<int>(i)))]);
  }
  block_table = HostTensor(DType::i32, {static_cast<std::int64_t>(requests), columns});
  for (std::size_t r = 0; r < requests; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      std::int32_t& entry = block_table.as<std::int32_t>()[r * static_cast<std::size_t>(columns) +
                                                           static_cast<std::size_t>(c)];
      entry = std::numeric_limits<std::int32_t>::max();
      if (c >= used_columns(r)) continue;
      entry = free.back();
      free.pop_back();
    }
  }
  return blocks;
}

void MlaRanks::fill_cache(int rank) {
  const HostTensor positions(DType::i64, {batch->keys});
  const HostTensor slots(DType::i64, {batch->keys});
  const auto cu = batch->cu_seq_lens.as<std::int32_t>();
  for (std::size_t r = 0; r + 1 < cu.size(); ++r) {
    for (std::int32_t i = cu[r]; i < cu[r + 1]; ++i) {
      positions.as<std::int64_t>()[static_cast<std::size_t>(i)] = i - cu[r];
    }
  }
  dcp_slot_mapping({.positions = positions,
                    .query_start_loc = batch->cu_seq_lens,
                    .block_table = block_table,
                    .block_size = block_size,
                    .layout = layout,
                    .rank = rank,
                    .slot_mapping = slots});
  concat_and_cache_mla({.kv_c = batch->kv_c,
                        .k_pe = batch->k_pe,
                        .kv_cache = cache[static_cast<std::size_t>(rank)],
                        .slot_mapping = slots,
                        .scale = batch->kv_scale});
}

DcpMlaDecodeArgs MlaRanks::args(int rank) const {
  const std::int64_t heads = batch->shape.heads / layout.world_size;
  DcpMlaDecodeArgs a;
  a.q = batch->q.view().slice(1, rank * heads, heads);
  a.kv_cache = cache[static_cast<std::size_t>(rank)];
  a.block_table = block_table;
  a.query_start_loc = batch->query_start_loc;
  a.seq_lens = batch->seq_lens;
  a.out = out.view().slice(1, rank * heads, heads);
  a.lse = lse.view().slice(1, rank * heads, heads);
  if (is_fp8(batch->shape.kv_dtype)) a.kv_scale = batch->kv_scale;
  a.interleave = layout.interleave;
  a.params.scale = kScale;
  a.params.causal = batch->shape.causal;
  a.params.softcap = batch->shape.softcap;
  return a;
}

void MlaRanks::run(DcpCombine combine, int threads) {
  out.fill_bytes(0xFF);
  lse.fill_bytes(0xFF);
  run_in_process(layout.world_size, [&](Communicator& c) {
    const auto pool = make_thread_pool(threads);
    DcpMlaDecodeArgs a = args(c.rank());
    a.combine = combine;
    dcp_mla_decode(a, c, pool.get());
  });
}

MlaDecodeArgs MlaRanks::whole() const {
  const DcpMlaDecodeArgs a = args(0);
  MlaDecodeArgs m;
  m.q = a.q;
  m.kv_cache = a.kv_cache;
  m.block_table = a.block_table;
  m.query_start_loc = a.query_start_loc;
  m.seq_lens = a.seq_lens;
  m.out = a.out;
  m.lse = a.lse;
  m.kv_scale = a.kv_scale;
  m.params = a.params;
  return m;
}

namespace {

/// Rows of all requests as attention sees them, one after the other.
HostTensor read_rows(const MlaRanks& whole) {
  const MlaBatch& b = *whole.batch;
  const DType dtype = is_fp8(b.shape.kv_dtype) ? DType::f32 : b.shape.dtype;
  HostTensor rows(dtype, {b.keys, b.shape.dim()});
  gather_and_maybe_dequant_cache({.src_cache = whole.cache[0],
                                  .dst = rows,
                                  .block_table = whole.block_table,
                                  .cu_seq_lens = b.cu_seq_lens,
                                  .scale = b.kv_scale});
  return rows;
}

/// Largest size of a product of `query` with the rows [begin, end), and per column of the latent
/// the largest size of a value.
struct Magnitudes {
  double logit = 0.0;
  std::vector<double> values;
};

double norm(const ConstTensorView& row) {
  double squares = 0.0;
  for (std::int64_t d = 0; d < row.shape[0]; ++d) squares += std::pow(get(row, {d}), 2);
  return std::sqrt(squares);
}

Magnitudes magnitudes(const MlaBatchShape& s, const HostTensor& rows, std::int64_t begin,
                      std::int64_t end) {
  Magnitudes m;
  m.values.resize(static_cast<std::size_t>(s.latent));
  for (std::int64_t j = begin; j < end; ++j) {
    m.logit = std::max(m.logit, kScale * norm(rows.view().select(0, j)));
    for (int d = 0; d < s.latent; ++d) {
      double& largest = m.values[static_cast<std::size_t>(d)];
      largest = std::max(largest, std::abs(get(rows, {j, d})));
    }
  }
  return m;
}

}  // namespace

oracle::Result expected(const MlaRanks& whole, int ranks) {
  const MlaBatch& b = *whole.batch;
  const MlaBatchShape& s = b.shape;
  const HostTensor rows = read_rows(whole);
  oracle::Result result = oracle::mla_decode(whole.whole());
  const double type_unit = s.dtype == DType::f32 ? kUnit : s.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const double least = s.dtype == DType::f16 ? 0x1p-25 : 0.0;
  const auto starts = b.query_start_loc.as<std::int32_t>();
  const auto cu = b.cu_seq_lens.as<std::int32_t>();
  for (std::size_t r = 0; r + 1 < cu.size(); ++r) {
    const Magnitudes most = magnitudes(s, rows, cu[r], cu[r + 1]);
    for (std::int64_t row = starts[r] * s.heads; row < starts[r + 1] * s.heads; ++row) {
      const auto i = static_cast<std::size_t>(row);
      const double largest =
          norm(b.q.view().select(0, row / s.heads).select(0, row % s.heads)) * most.logit +
          std::log(static_cast<double>(cu[r + 1] - cu[r] + 1));
      const double lse_error = result.lse_bound[i] + 8 * kUnit * largest;
      result.lse_bound[i] = lse_error + 2 * kUnit * largest;
      const double relative = 4 * lse_error + (ranks + 6) * kUnit + 2 * kUnit * largest;
      for (std::size_t d = 0; d < most.values.size(); ++d) {
        // The largest value stands for the weighed mean of sizes, which is not larger.
        const double size = most.values[d];
        result.out_bound[i * most.values.size() + d] +=
            2 * relative * size + 1.01 * (type_unit * size + least);
      }
    }
  }
  return result;
}

void expect_within(const MlaRanks& ranks, const oracle::Result& want) {
  const MlaBatchShape& s = ranks.batch->shape;
  std::size_t i = 0;
  for (std::int64_t t = 0; t < ranks.batch->tokens; ++t) {
    for (int h = 0; h < s.heads; ++h) {
      const auto row = static_cast<std::size_t>(t * s.heads + h);
      ASSERT_NEAR(get(ranks.lse.view(), {t, h}), want.lse[row], want.lse_bound[row])
          << "token " << t << " head " << h;
      for (int d = 0; d < s.latent; ++d, ++i) {
        ASSERT_NEAR(get(ranks.out.view(), {t, h, d}), want.out[i], want.out_bound[i])
            << "token " << t << " head " << h << " dim " << d;
      }
    }
  }
}

}  // namespace attend::testing
