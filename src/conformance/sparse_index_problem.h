// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attend/ops/sparse_index.h"
#include "conformance/check.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// Tokens that an indexer chose, of several requests in pages, hostile ones among them.
struct SparseIndexProblem {
  /// Tokens lie in requests as long as what `world_size` ranks hold.
  SparseIndexProblem(Rng& rng, int world_size);

  SparseIndexPages pages() const { return {table.view(), num_blocks, block_size, stride}; }
  TensorView counts_view() const { return wants_counts ? counts.view() : TensorView(); }
  /// A number that is no index.
  static std::int64_t hostile(Rng& rng);
  /// The oracle's row of a token of query token t.
  std::int64_t paged_row(std::int64_t t, std::int64_t token, int rank, int world_size,
                         int interleave = 1) const;

  void reset();
  /// Expects the row of query token t from row_of(token).
  template <typename RowOf>
  void expect_row(std::int64_t t, bool compacted, RowOf&& row_of) {
    std::vector<std::int64_t> rows(static_cast<std::size_t>(topk), -1);
    std::size_t valid = 0;
    for (std::int64_t j = 0; j < topk; ++j) {
      const std::int64_t row =
          row_of(token_indices.view().as<std::int32_t>()[token_indices.offset({t, j})]);
      if (row >= 0) rows[compacted ? valid : static_cast<std::size_t>(j)] = row;
      if (row >= 0) ++valid;
    }
    expect_rows(t, rows, valid);
  }
  Outcome outcome() const;
  std::string describe() const;

  int block_size;
  std::int64_t tokens, topk, num_blocks, stride;
  bool wants_counts;
  Storage table, req_id, token_indices, out, counts;

 private:
  void expect_rows(std::int64_t t, const std::vector<std::int64_t>& rows, std::size_t valid);
};

}  // namespace attend::conformance
