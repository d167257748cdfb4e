// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/fast_prefill.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "batch/require_causal.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "make_kv_sharing_fast_prefill_metadata";

/// Number of kept tokens of each request, after checking that they are its last ones.
std::vector<std::int32_t> count_kept(const CommonMetadata& m) {
  const check::Where where{kOp, "logits_indices"};
  const std::vector<std::int32_t>& wanted = m.logits_indices;
  check::require(m.num_tokens == 0 || !wanted.empty(), where, "the tokens whose logits are wanted",
                 "none");
  std::vector<std::int32_t> counts;
  std::size_t next = 0;
  for (int r = 0; r < m.num_reqs; ++r) {
    const std::size_t first = next;
    const std::int32_t end = m.query_start_loc[static_cast<std::size_t>(r) + 1];
    while (next < wanted.size() && wanted[next] < end) ++next;
    const auto kept = static_cast<std::int32_t>(next - first);
    for (std::size_t i = first; i < next; ++i) {
      const std::int32_t expected = end - static_cast<std::int32_t>(next - i);
      check::require(
          wanted[i] == expected, where,
          [&] { return fmt::format("{}: the last {} tokens of request {}", expected, kept, r); },
          [&] { return fmt::format("{} at index {}", wanted[i], i); });
    }
    counts.push_back(kept);
  }
  return counts;
}

}  // namespace

CommonMetadata make_kv_sharing_fast_prefill_metadata(const CommonMetadata& m) {
  m.validate();
  if (m.max_query_len <= 1) return m;
  require_causal(kOp, m);
  const std::vector<std::int32_t> counts = count_kept(m);

  CommonMetadata kept = m.unpadded(m.num_tokens, m.num_reqs);
  kept.query_start_loc.assign(1, 0);
  for (const std::int32_t n : counts) {
    kept.query_start_loc.push_back(kept.query_start_loc.back() + n);
  }
  kept.num_tokens = kept.query_start_loc.back();
  kept.max_query_len = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  kept.causal = true;
  kept.request_causal.clear();
  kept.slot_mapping.clear();
  kept.encoder_slot_mapping.clear();
  std::vector<std::int64_t> positions;
  for (std::size_t i = 0; i < m.logits_indices.size() && !m.positions.empty(); ++i) {
    positions.push_back(m.positions[static_cast<std::size_t>(m.logits_indices[i])]);
  }
  kept.positions = std::move(positions);
  std::iota(kept.logits_indices.begin(), kept.logits_indices.end(), 0);
  return kept;
}

}  // namespace attend
