// SPDX-License-Identifier: Apache-2.0
#include "bench/batch.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "bench/random_fill.h"

namespace attend::bench {
namespace {

int blocks_of(int keys, int block_size) { return (keys + block_size - 1) / block_size; }

/// Shuffled numbers 0 .. count - 1.
std::vector<std::int32_t> shuffled(std::int64_t count) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  for (std::size_t i = ids.size(); i-- > 1;) std::swap(ids[i], ids[hash64(i) % (i + 1)]);
  return ids;
}

/// Shared blocks first, then those of one request after the other, all in shuffled places.
void make_table(Batch& b, int shared_blocks) {
  std::int64_t count = shared_blocks;
  for (const std::int32_t keys : b.seq_lens) {
    const int blocks = blocks_of(keys, b.block_size);
    b.table_width = std::max(b.table_width, blocks);
    count += blocks - shared_blocks;
  }
  b.num_rows = count * b.block_size;
  const std::vector<std::int32_t> ids = shuffled(count);
  b.table.assign(b.seq_lens.size() * static_cast<std::size_t>(b.table_width), 0);
  auto next = ids.begin() + shared_blocks;
  for (std::size_t r = 0; r < b.seq_lens.size(); ++r) {
    const auto to = b.table.begin() + static_cast<std::ptrdiff_t>(r) * b.table_width;
    const int own = blocks_of(b.seq_lens[r], b.block_size) - shared_blocks;
    std::copy(next, next + own, std::copy_n(ids.begin(), shared_blocks, to));
    next += own;
  }
}

}  // namespace

std::vector<Request> requests(int count, int query_len, int seq_len) {
  return std::vector<Request>(static_cast<std::size_t>(count), Request{query_len, seq_len});
}

int Batch::query_len(int request) const noexcept {
  const auto r = static_cast<std::size_t>(request);
  return query_start[r + 1] - query_start[r];
}

std::int64_t Batch::row(int request, std::int64_t j) const noexcept {
  if (block_size == 0) return key_start[static_cast<std::size_t>(request)] + j;
  const std::int64_t at = std::int64_t{request} * table_width + j / block_size;
  return std::int64_t{table[static_cast<std::size_t>(at)]} * block_size + j % block_size;
}

double Batch::pairs(int window_left, int begin, int end) const noexcept {
  double sum = 0.0;
  for (int r = begin; r < end; ++r) {
    const int keys = seq_lens[static_cast<std::size_t>(r)];
    for (int seen = keys - query_len(r) + 1; seen <= keys; ++seen)
      sum += window_left < 0 ? seen : std::min(seen, window_left + 1);
  }
  return sum;
}

std::int64_t Batch::visible_keys(int window_left, int begin, int end) const noexcept {
  std::int64_t sum = 0;
  for (int r = begin; r < end; ++r) {
    const int keys = seq_lens[static_cast<std::size_t>(r)];
    sum += window_left < 0 ? keys : std::min(keys, query_len(r) + window_left);
  }
  return sum;
}

ConstTensorView Batch::table_view(int begin, int end) const noexcept {
  return {table.data() + std::int64_t{begin} * table_width, DType::i32, {end - begin, table_width}};
}

Batch make_batch(std::span<const Request> requests, int block_size, int shared_keys) {
  Batch b;
  b.block_size = block_size;
  b.query_start = b.key_start = {0};
  for (const Request& r : requests) {
    b.query_start.push_back(b.query_start.back() + r.query_len);
    b.key_start.push_back(b.key_start.back() + r.seq_len);
    b.seq_lens.push_back(r.seq_len);
  }
  b.num_rows = b.key_start.back();
  if (block_size > 0) make_table(b, shared_keys / block_size);
  return b;
}

AttentionPlanInput plan_input(const Batch& batch, const Heads& heads, const Executor& executor) {
  AttentionPlanInput in;
  in.query_start_loc = batch.query_start;
  in.seq_lens = batch.seq_lens;
  in.num_q_heads = heads.query;
  in.num_kv_heads = heads.kv;
  in.head_dim_qk = heads.dim;
  in.head_dim_v = heads.value_dim();
  in.num_workers = executor.num_workers();
  return in;
}

std::vector<Row> sample_rows(const Batch& batch, int num_q_heads) {
  constexpr std::size_t kRows = 24;
  constexpr std::int64_t kKeys = 1 << 20;  // in float64, this takes seconds
  std::vector<Row> rows;
  std::int64_t keys = 0;
  while (rows.size() < kRows && keys < kKeys) {
    const std::uint64_t pick = hash64(rows.size());
    const auto below = [](std::uint64_t bits, int n) {
      return static_cast<int>(bits % static_cast<unsigned>(n));
    };
    Row row{below(pick, batch.num_reqs()), 0, below(pick >> 44, num_q_heads)};
    if (rows.empty()) row.request = 0;
    if (rows.size() == 1) row.request = batch.num_reqs() - 1;
    const int tokens = batch.query_len(row.request);
    if (!rows.empty()) row.token = rows.size() == 1 ? tokens - 1 : below(pick >> 20, tokens);
    keys += batch.seq_lens[static_cast<std::size_t>(row.request)];
    rows.push_back(row);
  }
  return rows;
}

oracle::RowProblem row_problem(const Batch& batch, const Heads& heads, const Row& row) {
  oracle::RowProblem p;
  p.head_dim_qk = heads.dim;
  p.head_dim_v = heads.value_dim();
  p.num_keys = batch.seq_lens[static_cast<std::size_t>(row.request)];
  p.position = row.token + p.num_keys - batch.query_len(row.request);
  p.scale = 1.0 / std::sqrt(static_cast<double>(heads.dim));
  return p;
}

std::string compare_row(const oracle::RowProblem& problem, const Row& row, const void* out,
                        DType dtype) {
  const oracle::RowResult want = oracle::attention_row(problem);
  for (int d = 0; d < problem.head_dim_v; ++d) {
    const double got = value_at(out, dtype, d);
    const double bound = oracle::out_error_bound(want, d, problem.head_dim_qk, dtype);
    const double expected = want.out[static_cast<std::size_t>(d)];
    if (!(std::abs(got - expected) <= bound))
      return fmt::format("request {} token {} head {} dim {}: expected {} +- {}, got {}",
                         row.request, row.token, row.head, d, expected, bound, got);
  }
  return "";
}

}  // namespace attend::bench
