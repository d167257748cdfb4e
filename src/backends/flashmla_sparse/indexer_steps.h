// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/dist/decode_context_parallel.h"
#include "backends/flashmla_sparse/steps.h"

namespace attend::flashmla_sparse {

/// Query tokens that stand beside each other and have logits at the same time: the same number of
/// each request.
struct LogitsChunk {
  int request_begin = 0, request_end = 0;
  std::int32_t token_begin = 0, token_end = 0;
  std::int32_t first_key = 0;  ///< of the one request, among the gathered keys
  std::int32_t columns = 0;    ///< most keys that one of them sees in the cache of a rank

  int num_requests() const noexcept { return request_end - request_begin; }
  std::int32_t num_tokens() const noexcept { return token_end - token_begin; }
  std::int64_t logits() const noexcept { return std::int64_t{num_tokens()} * columns; }
};

/// Some chunks, before which keys may be gathered.
struct IndexerStep {
  int request_begin = 0, request_end = 0;  ///< of the gather
  std::vector<std::int32_t> cu_seq_lens;   ///< its rows, those of rank 0; empty = read pages
  std::vector<LogitsChunk> chunks;
};

struct IndexerSteps {
  std::vector<IndexerStep> steps;  ///< empty = no token sees more tokens than are chosen
  std::int64_t most_keys = 0;      ///< of a gather
  std::int64_t most_logits = 0;    ///< of a chunk
  std::int64_t most_tokens = 0;    ///< likewise
};

struct IndexerBudget {
  int topk = 0;
  int first_prefill = 0;        ///< request; those before it read pages
  std::int64_t max_keys = 0;    ///< gathered at a time; a longer request reads pages
  std::int64_t max_logits = 0;  ///< >= tokens of the longest request
  DcpLayout layout = {};        ///< the keys of a cache are those of one rank
};

/// Chunks for the query tokens that see more than `topk` tokens. They are the same on all ranks,
/// since the ranks exchange what they choose chunk by chunk: each counts the keys of a request as
/// rank 0 does, which never has fewer than another. Of more tokens than one, what is exchanged (a
/// position and a logit for each choice of each rank) is no more than `max_logits` numbers either.
IndexerSteps cut_indexer(const Requests& requests, const IndexerBudget& budget);

}  // namespace attend::flashmla_sparse
