// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "attend/core/dtype.h"
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"
#include "attend/oracle/attention.h"
#include "attend/plan/attention_plan.h"

/// Lengths, masks and block tables of the attention cases, and their comparison with the oracle.
/// Every case is causal.
namespace attend::bench {

/// Lengths of one request; its queries are its last tokens.
struct Request {
  int query_len, seq_len;
};
/// `count` requests alike.
std::vector<Request> requests(int count, int query_len, int seq_len);

/// Query heads, kv heads and head sizes.
struct Heads {
  int query = 32, kv = 8, dim = 128;
  int dim_v = 0;  ///< of values; 0 = dim
  int group() const noexcept { return query / kv; }
  int value_dim() const noexcept { return dim_v == 0 ? dim : dim_v; }
};

/// Requests one after the other, and where their keys lie.
struct Batch {
  std::vector<std::int32_t> query_start, key_start;  ///< [B + 1]
  std::vector<std::int32_t> seq_lens;                ///< [B]
  int block_size = 0;                                ///< 0 = ragged
  int table_width = 0;                               ///< most blocks of a request
  std::vector<std::int32_t> table;                   ///< [B, table_width], shuffled blocks
  std::int64_t num_rows = 0;                         ///< key rows of a head in memory

  int num_reqs() const noexcept { return static_cast<int>(seq_lens.size()); }
  int query_len(int request) const noexcept;
  /// Number of the row of key j of a request: block * block_size + place in the block.
  std::int64_t row(int request, std::int64_t j) const noexcept;
  /// Pairs of a query and a key that it sees, of requests [begin, end); window_left as in
  /// AttentionParams.
  double pairs(int window_left, int begin, int end) const noexcept;
  /// Keys that some query of requests [begin, end) sees; those of each request for itself.
  std::int64_t visible_keys(int window_left, int begin, int end) const noexcept;
  /// Rows [begin, end) of the table.
  ConstTensorView table_view(int begin, int end) const noexcept;
};

/// Lays out a batch. Paged: the first `shared_keys` keys (whole blocks) of all requests are the
/// same blocks.
Batch make_batch(std::span<const Request> requests, int block_size, int shared_keys = 0);

/// What a plan of the whole batch is made from; refers to the batch.
AttentionPlanInput plan_input(const Batch& batch, const Heads& heads, const Executor& executor);

/// One output row.
struct Row {
  int request, token, head;
};
/// Some rows: the first token of the first request, the last of the last, then any.
std::vector<Row> sample_rows(const Batch& batch, int num_q_heads);
/// Heads, position and length of a row's problem; its values and everything else are the caller's.
oracle::RowProblem row_problem(const Batch& batch, const Heads& heads, const Row& row);
/// Compares the output at `out` ([head_dim], of `dtype`) with the oracle's; "" = within the bound.
std::string compare_row(const oracle::RowProblem& problem, const Row& row, const void* out,
                        DType dtype);

}  // namespace attend::bench
