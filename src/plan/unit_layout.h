// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attend/plan/attention_plan.h"

/// Sizes that the plan (which tells the caller how much workspace to bring) and the kernels (which
/// carve it up) must agree on.
namespace attend::plan {

inline constexpr int kPanelKeys = 32;    ///< keys of one packed K panel
inline constexpr int kPanelCols = 32;    ///< columns of one packed V panel
inline constexpr int kMaxTileRows = 12;  ///< largest register tile of any ISA level
inline constexpr int kBlockRows =
    48;  ///< rows whose logits are held at once; multiple of every tile
/// Floats from a row of logits to the next where AMX tiles hold them: no divisor of 4 KiB, which
/// would put all rows of a tile into the same few cache sets.
inline constexpr int kScoreStride = kPieceSize + 16;
inline constexpr int kStepDims = 32;  ///< dimensions of one product of AMX tiles
inline constexpr int kPanels = kPieceSize / kPanelKeys;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t m) { return (n + m - 1) / m * m; }

/// Where one worker's scratch arrays start, in floats from its base (64-byte aligned each).
struct ScratchLayout {
  std::int64_t q, s, acc, k_panels, v_panels, staged, scales, weights, rows, total;
  int padded_rows;  ///< unit rows rounded up to full tiles
  int padded_dv;    ///< head_dim_v rounded up to full V panels
};

/// `rows` holds 14 float-sized arrays of padded_rows each.
inline constexpr int kRowArrays = 14;

/// `branches`: AttentionPlan::branches, whose keys and values are packed and pointed at apart.
constexpr ScratchLayout scratch_layout(int max_unit_rows, int head_dim_qk, int head_dim_v,
                                       int branches = 1) {
  ScratchLayout l{};
  // The rows of each map fill whole tiles.
  l.padded_rows = static_cast<int>(round_up(max_unit_rows + branches * kMaxTileRows, kBlockRows));
  l.padded_dv = static_cast<int>(branches * round_up(head_dim_v / branches, kPanelCols));
  std::int64_t at = 0;
  auto take = [&at](std::int64_t floats) {
    const std::int64_t here = at;
    at += round_up(floats, 16);
    return here;
  };
  // AMX takes whole steps of dimensions: queries as up to three bf16 numbers, keys as one. Codes
  // take whole steps of twice as many dimensions, a byte each, which is never more.
  const std::int64_t step_dims = round_up(head_dim_qk, kStepDims);
  l.q = take(std::int64_t{l.padded_rows} * std::max<std::int64_t>(head_dim_qk, step_dims * 3 / 2) +
             8);
  l.s = take(std::int64_t{kBlockRows} * kScoreStride);
  l.acc = take(std::int64_t{l.padded_rows} * l.padded_dv);
  l.k_panels = take(branches * kPieceSize * std::max<std::int64_t>(head_dim_qk, step_dims / 2));
  l.v_panels = take(std::int64_t{kPieceSize} * l.padded_dv);
  // Decoded keys and values of a piece, 2 bytes each; touched for caches of codes only.
  l.staged = take(kPieceSize * (branches * step_dims + head_dim_v) / 2);
  // Scales of a piece's keys and values; rounded weights, a byte each.
  l.scales = take(std::int64_t{2} * kPieceSize);
  l.weights = take(std::int64_t{kBlockRows} * kPieceSize / 4);
  l.rows = take(std::int64_t{kRowArrays} * l.padded_rows);
  // Row pointers of K and V, 8 bytes each: current and next piece in memory, current piece decoded.
  l.total = round_up(at + std::int64_t{6} * branches * kPieceSize * 2, 1024);
  return l;
}

/// Floats of a row's state that is carried from one call to the next: m, l, then head_dim_v
/// accumulators.
inline constexpr int kCarryHeader = 2;

/// Floats of one stored partial row: m, l, the sum of the weights before rounding, then head_dim_v
/// accumulators.
inline constexpr int kPartialHeader = 3;
constexpr std::int64_t partial_row_floats(int head_dim_v) { return head_dim_v + kPartialHeader; }

/// Floats of all partials, with room for a vector that runs over the last row's end.
constexpr std::int64_t partial_floats(const AttentionPlan& p) {
  return round_up(p.num_partial_rows * partial_row_floats(p.head_dim_v) + 16, 16);
}

/// Bytes of an op's workspace: partials, one scratch a worker, and slack to align the start.
constexpr std::size_t workspace_bytes(const AttentionPlan& p) {
  const ScratchLayout scratch =
      scratch_layout(p.max_unit_rows, p.head_dim_qk, p.head_dim_v, p.branches);
  const std::int64_t floats = partial_floats(p) + scratch.total * p.num_workers;
  return static_cast<std::size_t>(floats) * sizeof(float) + 64;
}

}  // namespace attend::plan
