// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace attend::flashmla_sparse {

/// Requests of the batch that stand beside each other, and where their tokens read keys.
struct Step {
  int request_begin = 0, request_end = 0;
  std::int32_t token_begin = 0, token_end = 0;
  bool gathered = false;                       ///< from the workspace, else from the cache
  std::vector<std::int32_t> workspace_starts;  ///< [requests] first row of each, if gathered
  std::int32_t rows = 0;                       ///< of all of them

  int num_requests() const noexcept { return request_end - request_begin; }
};

/// A batch, as its builder sees it.
struct Requests {
  int num_reqs = 0;
  std::span<const std::int32_t> query_start_loc;
  std::span<const std::int32_t> seq_lens;

  std::int32_t query_len(int r) const noexcept {
    const auto i = static_cast<std::size_t>(r);
    return query_start_loc[i + 1] - query_start_loc[i];
  }
  std::int32_t seq_len(int r) const noexcept { return seq_lens[static_cast<std::size_t>(r)]; }
  /// Rows that a gather makes of a request: none if nothing asks for them.
  std::int32_t rows(int r) const noexcept { return query_len(r) == 0 ? 0 : seq_len(r); }
};

/// Every request reads the cache.
std::vector<Step> mixed_steps(const Requests& requests);

/// Requests from `first_prefill` on are gathered, as many at a time as have `workspace_rows` rows
/// together; one that has more reads the cache, as those before do. @pre workspace_rows >= 1.
std::vector<Step> separate_steps(const Requests& requests, int first_prefill,
                                 std::int64_t workspace_rows);

}  // namespace attend::flashmla_sparse
