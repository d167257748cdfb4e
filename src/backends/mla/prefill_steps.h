// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "attend/plan/attention_plan.h"

namespace attend::mla {

/// One call of a prefill back end: some requests of the batch that stand beside each other, and
/// some of the keys of each.
struct PrefillStep {
  int request_begin = 0, request_end = 0;
  std::int32_t token_begin = 0;           ///< their first query token in the batch
  bool last = false;                      ///< the keys are the rest of each request's
  std::vector<std::int32_t> starts;       ///< [n] first key
  std::vector<std::int32_t> cu_seq_lens;  ///< [n + 1] prefix sum of the numbers of keys
  std::vector<std::uint8_t> resumes;      ///< [n] 1 = earlier steps had keys of the request
  AttentionPlan plan;

  std::int64_t num_keys() const noexcept { return cu_seq_lens.back(); }
};

/// Requests of one batch that take the prefill path.
struct PrefillRequests {
  int begin = 0, end = 0;
  std::span<const std::int32_t> query_start_loc;  ///< of the batch
  std::span<const std::int32_t> seq_lens;         ///< of the batch
};

/// Cuts contexts into chunks of whole pieces, so that every key lies in the piece in which one call
/// over all keys would have it, then the rest of each request: what is left of its context and its
/// new tokens. Of a request without query tokens nothing is read. A step has at most `max_keys`
/// keys, unless one request's rest has more. Plans are left empty. @pre max_keys >= kPieceSize.
std::vector<PrefillStep> cut_prefill(const PrefillRequests& requests, std::int64_t max_keys);

}  // namespace attend::mla
