// SPDX-License-Identifier: Apache-2.0
#include "plan/plan_checks.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "attend/core/error.h"
#include "attend/plan/kernel_choice.h"
#include "core/check.h"

namespace attend::plan {
namespace {

void check_head_dim(check::Where where, int d, int largest) {
  check::require(
      d > 0 && d % 8 == 0 && d <= largest, where,
      [&] { return fmt::format("a multiple of 8 in [8, {}]", largest); }, d);
}

/// Differential attention: query heads in pairs, values twice as wide as keys.
void check_branches(const AttentionPlanInput& in) {
  check::require(in.branches == 1 || in.branches == 2, {in.op, "branches"}, "1 or 2", in.branches);
  if (in.branches == 1) return;
  check::require(
      in.num_q_heads / in.num_kv_heads % 2 == 0, {in.op, "num_q_heads"},
      [&] { return fmt::format("an even multiple of num_kv_heads = {}", in.num_kv_heads); },
      in.num_q_heads);
  check::require(
      in.head_dim_v == 2 * in.head_dim_qk, {in.op, "head_dim_v"},
      [&] { return fmt::format("{}, twice head_dim_qk", 2 * in.head_dim_qk); }, in.head_dim_v);
}

}  // namespace

void check_lengths(const AttentionPlanInput& in) {
  const auto at = [&](std::string_view argument) { return check::Where{in.op, argument}; };
  const auto& starts = in.query_start_loc;
  const auto& lens = in.seq_lens;
  check::require(!starts.empty(), at("query_start_loc"), "at least 1 entry", "0 entries");
  check::require(
      lens.size() + 1 == starts.size(), at("seq_lens"),
      [&] { return fmt::format("{} entries (query_start_loc has one more)", starts.size() - 1); },
      [&] { return fmt::format("{} entries", lens.size()); });
  check::require(starts[0] == 0, at("query_start_loc"), "0 at index 0", starts[0]);
  std::int64_t total_keys = 0;
  for (std::size_t r = 0; r < lens.size(); ++r) {
    check::require(
        starts[r + 1] >= starts[r], at("query_start_loc"),
        [&] { return fmt::format(">= {} at index {}", starts[r], r + 1); }, starts[r + 1]);
    check::require(
        lens[r] >= 0, at("seq_lens"), [&] { return fmt::format(">= 0 at index {}", r); }, lens[r]);
    total_keys += lens[r];
  }
  check::require(total_keys <= std::numeric_limits<std::int32_t>::max(), at("seq_lens"),
                 "a sum that fits 32 bits", total_keys);
  check::require(
      in.request_causal.empty() || in.request_causal.size() == lens.size(), at("request_causal"),
      [&] { return fmt::format("{} entries or none", lens.size()); },
      [&] { return fmt::format("{} entries", in.request_causal.size()); });
}

void check_shape(const AttentionPlanInput& in) {
  const auto at = [&](std::string_view argument) { return check::Where{in.op, argument}; };
  check::require(in.num_kv_heads > 0, at("num_kv_heads"), ">= 1", in.num_kv_heads);
  check::require(
      in.num_q_heads > 0 && in.num_q_heads % in.num_kv_heads == 0, at("num_q_heads"),
      [&] { return fmt::format("a positive multiple of num_kv_heads = {}", in.num_kv_heads); },
      in.num_q_heads);
  check_head_dim(at("head_dim_qk"), in.head_dim_qk, kMaxHeadDimQk);
  check_head_dim(at("head_dim_v"), in.head_dim_v, kMaxHeadDimV);
  check_branches(in);
  check::require(in.window_left >= -1, at("window_left"), ">= -1", in.window_left);
  check::require(in.window_right >= -1, at("window_right"), ">= -1", in.window_right);
  check::require(in.num_workers >= 1, at("num_workers"), ">= 1", in.num_workers);
  check::require(in.max_num_splits >= 0, at("max_num_splits"), ">= 0", in.max_num_splits);
}

void check_shared_prefixes(const AttentionPlanInput& in) {
  const check::Where where{in.op, "shared_prefixes"};
  const std::size_t num_reqs = in.seq_lens.size();
  std::vector<std::int32_t> shared(num_reqs, 0);  // keys of the prefixes so far
  for (std::size_t i = 0; i < in.shared_prefixes.size(); ++i) {
    const SharedPrefix& s = in.shared_prefixes[i];
    const auto range = [&] {
      return fmt::format("[{}, {}) at index {}", s.request_begin, s.request_end, i);
    };
    const auto keys = [&] { return fmt::format("{} keys at index {}", s.num_keys, i); };
    check::require(
        s.request_begin >= 0 && s.request_begin < s.request_end &&
            std::cmp_less_equal(s.request_end, num_reqs),
        where, [&] { return fmt::format("requests of [0, {})", num_reqs); }, range);
    const auto begin = static_cast<std::size_t>(s.request_begin);
    for (std::size_t r = begin; std::cmp_less(r, s.request_end); ++r) {
      check::require(shared[r] == shared[begin], where,
                     "requests that lie beside or inside of each range before", range);
      check::require(
          s.num_keys <= in.seq_lens[r], where,
          [&] { return fmt::format("at most the {} keys of request {}", in.seq_lens[r], r); },
          keys);
      check::require(
          s.num_keys > shared[r], where,
          [&] { return fmt::format("more than the {} keys that are shared already", shared[r]); },
          keys);
    }
    std::fill(shared.begin() + s.request_begin, shared.begin() + s.request_end, s.num_keys);
  }
}

IsaLevel checked_isa(std::optional<IsaLevel> wanted) {
  if (!wanted) {
    kernel_choice();  // read now: running the plan must not wait for a file
    return active_isa();
  }
  const auto levels = available_isa_levels();
  if (std::find(levels.begin(), levels.end(), *wanted) == levels.end())
    throw Unsupported(fmt::format("[plan_attention] ISA level {}", to_string(*wanted)),
                      {"this machine does not have it"});
  return *wanted;
}

}  // namespace attend::plan
