// SPDX-License-Identifier: Apache-2.0
#include "backends/flashmla_sparse/indexer_steps.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "dist/dcp/layout.h"

namespace attend::flashmla_sparse {
namespace {

class Cutter {
 public:
  Cutter(const Requests& requests, const IndexerBudget& budget)
      : requests_(requests), budget_(budget) {}

  IndexerSteps cut() {
    for (int r = 0; r < requests_.num_reqs; ++r) {
      if (num_long(r) == 0) continue;
      const bool gathered = r >= budget_.first_prefill && num_keys(r) <= budget_.max_keys;
      if (gathered) {
        add_to_gather(r);
        add_rows(
            r, result_.steps.back()
                   .cu_seq_lens[static_cast<std::size_t>(r - result_.steps.back().request_begin)]);
      } else {
        if (result_.steps.empty() || !result_.steps.back().cu_seq_lens.empty())
          result_.steps.emplace_back();
        if (!extend(r)) add_rows(r, 0);
      }
    }
    for (const IndexerStep& step : result_.steps)
      for (const LogitsChunk& c : step.chunks) {
        result_.most_logits = std::max(result_.most_logits, c.logits());
        result_.most_tokens = std::max<std::int64_t>(result_.most_tokens, c.num_tokens());
      }
    return std::move(result_);
  }

 private:
  /// Query tokens of a request, its last ones, that see more tokens than are chosen.
  std::int32_t num_long(int r) const {
    return std::min(requests_.query_len(r), std::max(0, requests_.seq_len(r) - budget_.topk));
  }
  /// Most of the first n tokens of a request that a rank holds.
  std::int32_t most_held(std::int32_t n) const {
    return static_cast<std::int32_t>(dcp::local_count(n, 0, budget_.layout));
  }
  std::int32_t num_keys(int r) const { return most_held(requests_.seq_len(r)); }
  /// Query tokens whose choices ranks may exchange at a time.
  std::int64_t max_exchanged() const {
    const std::int64_t ranks = budget_.layout.world_size;
    return ranks == 1 ? std::numeric_limits<std::int64_t>::max()
                      : budget_.max_logits / (2 * ranks * budget_.topk);
  }
  std::int32_t token_end(int r) const {
    return requests_.query_start_loc[static_cast<std::size_t>(r) + 1];
  }

  /// Makes the keys of a request the next rows of the last gather, or the first of a new one. A
  /// rank that has fewer than rank 0 gathers rows that nobody reads, too; they lie in the same
  /// blocks.
  void add_to_gather(int r) {
    const std::int32_t keys = num_keys(r);
    const bool fits = !result_.steps.empty() && !result_.steps.back().cu_seq_lens.empty() &&
                      result_.steps.back().cu_seq_lens.back() + keys <= budget_.max_keys;
    if (!fits) {
      IndexerStep& step = result_.steps.emplace_back();
      step.request_begin = step.request_end = r;
      step.cu_seq_lens.push_back(0);
    }
    IndexerStep& step = result_.steps.back();
    // Requests between that need no logits have no rows.
    for (; step.request_end < r; ++step.request_end)
      step.cu_seq_lens.push_back(step.cu_seq_lens.back());
    step.request_end = r + 1;
    step.cu_seq_lens.push_back(step.cu_seq_lens.back() + keys);
    result_.most_keys = std::max<std::int64_t>(result_.most_keys, step.cu_seq_lens.back());
  }

  /// Adds a request that decodes to the last chunk, if it has as many tokens as each one there.
  bool extend(int r) {
    std::vector<LogitsChunk>& chunks = result_.steps.back().chunks;
    const std::int32_t tokens = num_long(r);
    if (chunks.empty() || r >= budget_.first_prefill) return false;
    LogitsChunk wider = chunks.back();
    if (wider.request_end != r || wider.token_end != token_end(r) - tokens ||
        wider.num_tokens() != tokens * wider.num_requests())
      return false;
    wider.request_end = r + 1;
    wider.token_end = token_end(r);
    wider.columns = std::max(wider.columns, num_keys(r));
    if (wider.logits() > budget_.max_logits || wider.num_tokens() > max_exchanged()) return false;
    chunks.back() = wider;
    return true;
  }

  /// Chunks of one request, as few as the budget allows.
  void add_rows(int r, std::int32_t first_key) {
    const std::int64_t at_once =
        std::max<std::int64_t>(1, std::min(budget_.max_logits / num_keys(r), max_exchanged()));
    for (std::int32_t left = num_long(r); left > 0;) {
      const auto take = static_cast<std::int32_t>(std::min<std::int64_t>(left, at_once));
      LogitsChunk c;
      c.request_begin = r;
      c.request_end = r + 1;
      c.token_begin = token_end(r) - left;
      c.token_end = c.token_begin + take;
      c.first_key = first_key;
      left -= take;
      c.columns = most_held(requests_.seq_len(r) - left);
      result_.steps.back().chunks.push_back(c);
    }
  }

  const Requests& requests_;
  const IndexerBudget& budget_;
  IndexerSteps result_;
};

}  // namespace

IndexerSteps cut_indexer(const Requests& requests, const IndexerBudget& budget) {
  return Cutter(requests, budget).cut();
}

}  // namespace attend::flashmla_sparse
