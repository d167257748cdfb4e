// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/cascade.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "plan/cascade_cost.h"
#include "plan/shared_groups.h"

namespace attend {
namespace {

constexpr std::array<std::pair<CascadeMode, std::string_view>, 4> kModes = {{
    {CascadeMode::automatic, "auto"},
    {CascadeMode::vllm, "vllm"},
    {CascadeMode::off, "off"},
    {CascadeMode::always, "always"},
}};

constexpr std::array<std::pair<CascadeReason, std::string_view>, 15> kReasons = {{
    {CascadeReason::off, "switched off"},
    {CascadeReason::no_block_table, "there is no block table"},
    {CascadeReason::encoder_keys, "keys of encoders are attended to by each request for itself"},
    {CascadeReason::captured, "a plan made ahead of time has no room for shared prefixes"},
    {CascadeReason::nothing_shared, "no two requests begin with the same 256 cached keys"},
    {CascadeReason::no_gain, "attending flat is expected to be as fast"},
    {CascadeReason::gain, "expected to be faster"},
    {CascadeReason::always, "as asked for"},
    {CascadeReason::short_prefix, "the common prefix is shorter than 256 keys"},
    {CascadeReason::alibi, "the rule of vLLM excludes ALiBi"},
    {CascadeReason::window, "the rule of vLLM excludes sliding windows"},
    {CascadeReason::few_requests, "the rule of vLLM wants 8 requests"},
    {CascadeReason::more_than_decodes,
     "the rule of vLLM always shares unless grouped heads decode"},
    {CascadeReason::fewer_waves, "fewer waves of units by the rule of vLLM"},
    {CascadeReason::not_fewer_waves, "no fewer waves of units by the rule of vLLM"},
}};

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Shares the first `num_pieces` pieces, rounded up to whole blocks.
SharedPrefix prefix_of(const plan::SharedGroup& g, int block_size) {
  const std::int64_t keys = std::int64_t{g.num_pieces} * kPieceSize;
  return {g.request_begin, g.request_end,
          static_cast<std::int32_t>(ceil_div(keys, block_size) * block_size)};
}

int num_with_queries(const AttentionPlanInput& batch, const plan::SharedGroup& g) {
  int count = 0;
  for (int r = g.request_begin; r < g.request_end; ++r) {
    const auto i = static_cast<std::size_t>(r);
    count += batch.query_start_loc[i + 1] > batch.query_start_loc[i] ? 1 : 0;
  }
  return count;
}

/// The rule of vLLM's flash_attn back end, with workers in place of multiprocessors.
CascadeReason vllm_rule(const CascadeInput& in) {
  const AttentionPlanInput& b = in.batch;
  const auto num_reqs = static_cast<std::int64_t>(b.seq_lens.size());
  if (in.common_prefix_len < 256) return CascadeReason::short_prefix;
  if (in.use_alibi) return CascadeReason::alibi;
  if (b.window_left >= 0) return CascadeReason::window;
  if (num_reqs < 8) return CascadeReason::few_requests;
  const std::int64_t group = b.num_q_heads / b.num_kv_heads;
  bool flash_decoding = group > 1;
  for (std::size_t r = 0; r + 1 < b.query_start_loc.size(); ++r)
    flash_decoding &= b.query_start_loc[r + 1] - b.query_start_loc[r] == 1;
  if (!flash_decoding) return CascadeReason::more_than_decodes;
  constexpr std::int64_t kQueryTile = 128, kKeyTile = 128;
  const std::int64_t tiles = ceil_div(in.common_prefix_len, kKeyTile);
  const std::int64_t shared =
      ceil_div(b.num_q_heads * ceil_div(num_reqs, kQueryTile), b.num_workers) * tiles;
  const std::int64_t flat =
      ceil_div(num_reqs * b.num_kv_heads * ceil_div(group, kQueryTile) * tiles, b.num_workers);
  return shared < flat ? CascadeReason::fewer_waves : CascadeReason::not_fewer_waves;
}

CascadeDecision decide_as_vllm(const CascadeInput& in) {
  CascadeDecision decision;
  decision.reason = vllm_rule(in);
  if (decision.reason == CascadeReason::fewer_waves ||
      decision.reason == CascadeReason::more_than_decodes) {
    decision.prefixes.push_back(
        {0, static_cast<std::int32_t>(in.batch.seq_lens.size()), in.common_prefix_len});
  }
  return decision;
}

CascadeDecision decide_by_tables(const CascadeInput& in) {
  CascadeDecision decision;
  decision.reason = CascadeReason::nothing_shared;
  plan::SharedGroups groups(in);
  plan::CascadeCost cost(in);
  for (plan::SharedGroup group{}; groups.next(group);) {
    if (num_with_queries(in.batch, group) < 2) continue;
    if (in.mode == CascadeMode::automatic) {
      const plan::GroupCost c = cost.of(group);
      const bool gain = c.shared_us < plan::kLeastGain * c.flat_us;
      decision.flat_us += c.flat_us;
      decision.decided_us += gain ? c.shared_us : c.flat_us;
      if (!gain) {
        if (decision.prefixes.empty()) decision.reason = CascadeReason::no_gain;
        continue;
      }
    }
    cost.share(group);
    decision.prefixes.push_back(prefix_of(group, in.block_size));
    decision.reason = in.mode == CascadeMode::always ? CascadeReason::always : CascadeReason::gain;
  }
  return decision;
}

}  // namespace

std::string_view to_string(CascadeMode mode) noexcept {
  for (const auto& [m, name] : kModes)
    if (m == mode) return name;
  return "invalid";
}

std::optional<CascadeMode> parse_cascade_mode(std::string_view text) noexcept {
  for (const auto& [mode, name] : kModes)
    if (name == text) return mode;
  return std::nullopt;
}

std::string_view to_string(CascadeReason reason) noexcept {
  for (const auto& [r, text] : kReasons)
    if (r == reason) return text;
  return "invalid";
}

std::string describe(const CascadeDecision& d) {
  std::string text = d.prefixes.empty() ? "flat" : "cascade over";
  for (const SharedPrefix& p : d.prefixes) {
    text += fmt::format("{} {} keys of requests {}..{}", &p == d.prefixes.data() ? "" : ",",
                        p.num_keys, p.request_begin, p.request_end - 1);
  }
  text += fmt::format(": {}", to_string(d.reason));
  if (d.flat_us > 0.0) {
    text += fmt::format(" ({:.0f} us for shared keys, {:.0f} us flat)", d.decided_us, d.flat_us);
  }
  return text;
}

CascadeDecision decide_cascade(const CascadeInput& in) {
  CascadeDecision decision;
  if (in.mode == CascadeMode::off || in.batch.seq_lens.empty()) return decision;
  decision.reason = CascadeReason::no_block_table;
  if (!in.block_table.defined()) return decision;
  return in.mode == CascadeMode::vllm ? decide_as_vllm(in) : decide_by_tables(in);
}

}  // namespace attend
