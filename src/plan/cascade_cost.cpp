// SPDX-License-Identifier: Apache-2.0
#include "plan/cascade_cost.h"

#include <algorithm>

#include "plan/unit_layout.h"
#include "plan/unit_size.h"
#include "plan/visible_pieces.h"

namespace attend::plan {
namespace {

// Fitted on one worker of a Sapphire Rapids server, head sizes 64 and 128, bf16 and f32, 1 to 512
// rows a unit over 8192 keys, then 2 to 64 decodes with prefixes of 1, 4 and 32 pieces and as many
// of their own, as the bench cases cascade_* do it. Keys read over and over are in a cache, so
// reading is taken to be as fast as it is there.
constexpr double kBytesPerUs = 22e3;  ///< keys and values of a piece, packing included
/// A multiplication and an addition are two.
constexpr double kFlopsPerUsAvx512 = 130e3, kFlopsPerUsAvx2 = 80e3, kFlopsPerUsScalar = 18e3;
/// Keys and values that AMX tiles take; from the prefill of 4096 tokens.
constexpr double kFlopsPerUsAmx = 500e3;
/// Rows that fit one register tile compute beside the reading: this share of their time shows.
constexpr double kBesideReading = 0.57;
/// Storing a partial result and merging it later, which takes 0.12 to 0.18 us for 130 numbers.
constexpr double kPartialBytesPerUs = 3e3;
/// Workers wait for each other before the merge.
constexpr double kWaitUs = 10.0;

bool takes_tiles(IsaLevel isa, DType keys) {
  return isa >= IsaLevel::amx && keys != DType::f32 && keys != DType::f16;
}

double flops_per_us(IsaLevel isa, DType keys) {
  if (takes_tiles(isa, keys)) return kFlopsPerUsAmx;
  if (isa >= IsaLevel::avx512) return kFlopsPerUsAvx512;
  return isa >= IsaLevel::avx2 ? kFlopsPerUsAvx2 : kFlopsPerUsScalar;
}

}  // namespace

CascadeCost::CascadeCost(const CascadeInput& input)
    : in_(input), shared_(input.batch.seq_lens.size(), 0) {
  const AttentionPlanInput& b = in_.batch;
  const IsaLevel isa = b.isa.value_or(active_isa());
  const double products = double{kPieceSize} * (b.head_dim_qk + b.head_dim_v);
  group_ = b.num_q_heads / b.num_kv_heads;
  unit_rows_ = max_unit_rows(b.query_start_loc.back(), b.num_q_heads, b.num_workers);
  // Decoding fp8 takes as long as reading twice as many bytes.
  read_us_ =
      products * static_cast<double>(std::max<std::size_t>(2, size_of(in_.kv_dtype))) / kBytesPerUs;
  row_us_ = 2.0 * products / flops_per_us(isa, in_.kv_dtype);
  partial_us_ = 4.0 * static_cast<double>(partial_row_floats(b.head_dim_v)) / kPartialBytesPerUs;
  tile_rows_ = takes_tiles(isa, in_.kv_dtype) ? 16 : isa >= IsaLevel::avx512 ? 12 : 4;
}

/// Time of one unit over one piece.
double CascadeCost::piece_us(std::int64_t rows) const {
  const double beside = rows <= tile_rows_ ? kBesideReading : 1.0;
  return read_us_ + static_cast<double>(rows) * row_us_ * beside;
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
          heads * (units_us(rows) * (all.last - all.first) * idle + partials * partial_us_) +
              (from > 0 ? 0.0 : kWaitUs * b.num_workers)};
}

void CascadeCost::share(const SharedGroup& g) {
  std::fill(shared_.begin() + g.request_begin, shared_.begin() + g.request_end, g.num_pieces);
}

}  // namespace attend::plan
