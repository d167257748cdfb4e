// SPDX-License-Identifier: Apache-2.0
#include "plan/cascade_cost.h"

#include <algorithm>

#include "attend/plan/kernel_choice.h"
#include "plan/unit_size.h"
#include "plan/visible_pieces.h"

namespace attend::plan {
namespace {

/// Workers wait for each other before the merge.
constexpr double kWaitUs = 10.0;

IsaLevel level_of(const CascadeInput& in) {
  const KernelKind kind = kernel_kind(DType::bf16, in.kv_dtype, in.kv_dtype);
  return arithmetic_level(in.batch.arithmetic,
                          in.batch.isa ? *in.batch.isa : kernel_choice().level(kind), kind,
                          in.batch.op);
}

}  // namespace

CascadeCost::CascadeCost(const CascadeInput& input)
    : in_(input),
      group_(input.batch.num_q_heads / input.batch.num_kv_heads),
      unit_rows_(max_unit_rows(input.batch.query_start_loc.back(), input.batch.num_q_heads,
                               input.batch.head_dim_qk + input.batch.head_dim_v,
                               input.batch.num_workers)),
      cost_(unit_cost(level_of(input), input.kv_dtype, input.batch.head_dim_qk,
                      input.batch.head_dim_v)),
      shared_(input.batch.seq_lens.size(), 0) {}

/// Time of one unit over one piece.
double CascadeCost::piece_us(std::int64_t rows) const {
  return cost_.read_us + cost_.products_us(rows);
}

/// Time of `rows` rows over one piece, cut into units.
double CascadeCost::units_us(std::int64_t rows) const {
  const std::int64_t whole = rows / unit_rows_, rest = rows % unit_rows_;
  return static_cast<double>(whole) * piece_us(unit_rows_) + (rest > 0 ? piece_us(rest) : 0.0);
}

GroupCost CascadeCost::of(const SharedGroup& g) const {
  const AttentionPlanInput& b = in_.batch;
  const std::int32_t from = shared_[static_cast<std::size_t>(g.request_begin)];
  double flat = 0.0, partials = 0.0;
  std::int64_t rows = 0;
  PieceRange all{g.num_pieces, 0};
  for (std::int32_t r = g.request_begin; r < g.request_end; ++r) {
    const auto i = static_cast<std::size_t>(r);
    const int query_len = b.query_start_loc[i + 1] - b.query_start_loc[i];
    const bool causal = b.request_causal.empty() ? b.causal : b.request_causal[i] != 0;
    const RequestMask mask{b.seq_lens[i], query_len, b.window_left, causal ? 0 : b.window_right};
    const PieceRange seen = visible_pieces(mask, 0, query_len);
    const std::int32_t first = std::max(seen.first, from), last = std::min(seen.last, g.num_pieces);
    if (query_len == 0 || first >= last) continue;
    all = {std::min(all.first, first), std::max(all.last, last)};
    const std::int64_t own = query_len * group_;
    rows += own;
    flat += units_us(own) * (last - first);
    // One partial of the outermost prefix, and, if the request stored none so far, those of its
    // own pieces.
    partials += static_cast<double>(own * (from > 0 ? last - first : 1));
    if (from == 0) partials += static_cast<double>(own * (seen.last - last));
  }
  if (rows == 0) return {0.0, 0.0};
  const std::int64_t units = (rows + unit_rows_ - 1) / unit_rows_ * b.num_kv_heads;
  // Few units leave workers without work.
  const double idle =
      std::max(1.0, static_cast<double>(b.num_workers) / static_cast<double>(units));
  const double heads = b.num_kv_heads;
  return {heads * flat,
          heads * (units_us(rows) * (all.last - all.first) * idle + partials * cost_.partial_us) +
              (from > 0 ? 0.0 : kWaitUs * b.num_workers)};
}

void CascadeCost::share(const SharedGroup& g) {
  std::fill(shared_.begin() + g.request_begin, shared_.begin() + g.request_end, g.num_pieces);
}

}  // namespace attend::plan
