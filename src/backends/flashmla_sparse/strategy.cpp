// SPDX-License-Identifier: Apache-2.0
// Which strategy a batch takes: docs/adr/0024-sparse-prefill-strategies.md.
#include "backends/flashmla_sparse/strategy.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

namespace attend {
namespace {

constexpr std::array<std::pair<SparseStrategy, std::string_view>, 3> kStrategies = {{
    {SparseStrategy::automatic, "automatic"},
    {SparseStrategy::mixed, "mixed"},
    {SparseStrategy::separate, "separate"},
}};

}  // namespace

std::string_view to_string(SparseStrategy s) noexcept {
  for (const auto& [strategy, name] : kStrategies)
    if (strategy == s) return name;
  return "invalid";
}

std::optional<SparseStrategy> parse_sparse_strategy(std::string_view text) noexcept {
  for (const auto& [strategy, name] : kStrategies)
    if (name == text) return strategy;
  return std::nullopt;
}

std::string_view to_string(SparseReason reason) noexcept {
  switch (reason) {
    case SparseReason::asked_for:
      return "asked for";
    case SparseReason::bf16_rows:
      return "the cache holds bf16 rows";
    case SparseReason::no_prefills:
      return "no request prefills";
    case SparseReason::context_parallel:
      return "keys are spread over ranks";
    case SparseReason::small_workspace:
      return "no request that prefills fits the workspace";
    case SparseReason::reading_is_cheaper:
      return "a gather would cost more than it saves";
    case SparseReason::gather_is_cheaper:
      return "a gather costs less than it saves";
  }
  return "invalid";
}

std::string describe(const SparseDecision& d) {
  std::string text = fmt::format("{}: {}", to_string(d.strategy), to_string(d.reason));
  if (d.gather_us > 0.0)
    text +=
        fmt::format(" (dequantising {:.0f} us, gathering {:.0f} us)", d.dequantise_us, d.gather_us);
  return text;
}

std::int64_t sparse_workspace_tokens(std::int64_t max_model_len) noexcept {
  const std::int64_t wanted = std::min(5 * max_model_len, kSparseMostWorkspaceTokens);
  return std::max(wanted, max_model_len);
}

}  // namespace attend

namespace attend::flashmla_sparse {
namespace {

// Nanoseconds of one worker, measured: see the record named above.
constexpr double kDequantiseRow = 50.0;  ///< a row of codes more than one of bf16, in attention
constexpr double kGatherRow = 420.0;     ///< a row from the cache into the workspace
constexpr double kGatherStart = 10000.0;

SparseDecision estimate(const StrategyInput& in, const Requests& requests) {
  double visits = 0.0, rows = 0.0;
  for (int r = in.first_prefill; r < requests.num_reqs; ++r) {
    if (requests.query_len(r) == 0 || requests.rows(r) > in.workspace_rows) continue;
    rows += requests.rows(r);
    for (std::int32_t i = 0; i < requests.query_len(r); ++i)
      visits += std::min(in.topk, requests.seq_len(r) - i);
  }
  if (rows == 0.0) return {SparseStrategy::mixed, SparseReason::small_workspace, 0.0, 0.0};
  const double share = 1e-3 / in.num_workers;
  SparseDecision d;
  d.dequantise_us = visits * kDequantiseRow * share;
  d.gather_us = rows * kGatherRow * share + kGatherStart * 1e-3;
  const bool gathers = d.gather_us < d.dequantise_us;
  d.strategy = gathers ? SparseStrategy::separate : SparseStrategy::mixed;
  d.reason = gathers ? SparseReason::gather_is_cheaper : SparseReason::reading_is_cheaper;
  return d;
}

}  // namespace

SparseDecision decide(const StrategyInput& in, const Requests& requests) {
  if (in.asked != SparseStrategy::automatic) return {in.asked, SparseReason::asked_for, 0.0, 0.0};
  const auto mixed = [](SparseReason reason) {
    return SparseDecision{SparseStrategy::mixed, reason, 0.0, 0.0};
  };
  if (in.dcp_world_size > 1) return mixed(SparseReason::context_parallel);
  if (!in.has_codes) return mixed(SparseReason::bf16_rows);
  if (in.first_prefill >= requests.num_reqs) return mixed(SparseReason::no_prefills);
  return estimate(in, requests);
}

}  // namespace attend::flashmla_sparse
