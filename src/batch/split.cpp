// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/split.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "core/check.h"

namespace attend {
namespace {

DecodePrefillSplit all_decodes(const CommonMetadata& m) noexcept {
  return {m.num_reqs, 0, m.num_tokens, 0};
}

// Index of the first request that counts as prefill; num_reqs = none.
int first_prefill(const CommonMetadata& m, const SplitOptions& o) noexcept {
  const int first_len = m.query_len(0);
  const auto is_fresh = [&](int r) {
    return o.fresh_prompts_are_prefills && m.query_len(r) > 0 && m.num_computed_tokens(r) == 0;
  };
  if (first_len > o.decode_threshold) return 0;
  const auto is_uniform_or_padding = [&](int r) {
    const int len = m.query_len(r);
    return len == first_len || len == 0;
  };
  if (o.require_uniform && o.treat_short_extends_as_decodes && !o.fresh_prompts_are_prefills) {
    bool all_uniform = true;
    for (int r = 0; r < m.num_reqs; ++r) all_uniform = all_uniform && is_uniform_or_padding(r);
    if (all_uniform) return m.num_reqs;
  }
  for (int r = 0; r < m.num_reqs; ++r) {
    const int len = m.query_len(r);
    const bool too_long = o.require_uniform ? len != first_len : len > o.decode_threshold;
    const bool prefilling =
        !o.treat_short_extends_as_decodes && m.is_prefilling[static_cast<std::size_t>(r)] != 0;
    if (too_long || prefilling || is_fresh(r)) return r;
  }
  return m.num_reqs;
}

enum Region : std::uint8_t { kDecode, kShortExtend, kLongExtend, kPrefill, kNumRegions };

Region region_of(const ReorderRequest& r, int decode_threshold) noexcept {
  if (r.num_computed_tokens == 0) return kPrefill;
  if (r.num_scheduled_tokens > decode_threshold) return kLongExtend;
  return r.num_computed_tokens >= r.num_prompt_tokens ? kDecode : kShortExtend;
}

void require_threshold(std::string_view op, int decode_threshold) {
  check::require(decode_threshold >= 1, {op, "decode_threshold"}, "a number >= 1",
                 decode_threshold);
}

}  // namespace

DecodePrefillSplit split_decodes_and_prefills(const CommonMetadata& m, const SplitOptions& o) {
  constexpr std::string_view kOp = "split_decodes_and_prefills";
  require_threshold(kOp, o.decode_threshold);
  if (!o.treat_short_extends_as_decodes) {
    check::require(
        m.is_prefilling.size() >= static_cast<std::size_t>(m.num_reqs), {kOp, "is_prefilling"},
        [&] { return fmt::format("{} entries, to tell short extends from decodes", m.num_reqs); },
        m.is_prefilling.size());
  }
  if (m.num_reqs == 0) return all_decodes(m);
  const bool any_short_batch_is_decode = o.treat_short_extends_as_decodes &&
                                         !o.fresh_prompts_are_prefills &&
                                         (!o.require_uniform || o.decode_threshold <= 1);
  if (any_short_batch_is_decode && m.max_query_len <= o.decode_threshold) return all_decodes(m);

  const int decodes = first_prefill(m, o);
  if (decodes == m.num_reqs) return all_decodes(m);
  const int decode_tokens = m.query_start_loc[static_cast<std::size_t>(decodes)];
  return {decodes, m.num_reqs - decodes, decode_tokens, m.num_tokens - decode_tokens};
}

std::vector<std::pair<int, int>> reorder_swaps(std::span<const ReorderRequest> requests,
                                               int decode_threshold) {
  require_threshold("reorder_swaps", decode_threshold);
  const std::size_t n = requests.size();
  std::vector<Region> region(n);
  std::array<std::size_t, kNumRegions> sizes{};
  for (std::size_t i = 0; i < n; ++i) {
    region[i] = region_of(requests[i], decode_threshold);
    ++sizes[region[i]];
  }

  // Rows outside their target region, by position and again by region: the k-th of the second list
  // moves to the k-th position of the first.
  std::vector<std::size_t> positions;
  std::size_t end = 0;
  for (std::size_t target = 0, i = 0; target < kNumRegions; ++target) {
    for (end += sizes[target]; i < end; ++i) {
      if (region[i] != target) positions.push_back(i);
    }
  }
  std::vector<std::size_t> movers = positions;
  // By row as well: requests of a region keep their order.
  std::ranges::sort(movers, {}, [&](std::size_t i) { return std::pair(region[i], i); });

  std::vector<std::size_t> source(n);  // row that position i must get; itself if it stays
  for (std::size_t i = 0; i < n; ++i) source[i] = i;
  for (std::size_t k = 0; k < positions.size(); ++k) source[positions[k]] = movers[k];

  // Each cycle of the permutation takes one swap less than it has members.
  std::vector<std::pair<int, int>> swaps;
  for (const std::size_t start : positions) {
    std::size_t at = start;
    while (source[at] != start) {
      const std::size_t from = std::exchange(source[at], at);
      swaps.emplace_back(static_cast<int>(at), static_cast<int>(from));
      at = from;
    }
    source[at] = at;
  }
  return swaps;
}

}  // namespace attend
