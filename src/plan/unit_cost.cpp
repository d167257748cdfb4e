// SPDX-License-Identifier: Apache-2.0
#include "plan/unit_cost.h"

#include <algorithm>

#include "attend/plan/kernel_choice.h"
#include "plan/unit_layout.h"

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

bool takes_tiles(IsaLevel isa, DType keys) {
  return has_fast_kernel(isa, kernel_kind(DType::bf16, keys, keys));
}

double flops_per_us(IsaLevel isa, DType keys) {
  if (takes_tiles(isa, keys)) return kFlopsPerUsAmx;
  if (isa >= IsaLevel::avx512) return kFlopsPerUsAvx512;
  return isa >= IsaLevel::avx2 ? kFlopsPerUsAvx2 : kFlopsPerUsScalar;
}

}  // namespace

double UnitCost::products_us(std::int64_t rows) const noexcept {
  return static_cast<double>(rows) * row_us * (rows <= tile_rows ? kBesideReading : 1.0);
}

UnitCost unit_cost(IsaLevel isa, DType keys, int head_dim_qk, int head_dim_v) {
  const double products = double{kPieceSize} * (head_dim_qk + head_dim_v);
  // Decoding codes takes as long as reading twice as many bytes.
  const auto bytes = static_cast<double>(std::max<std::size_t>(2, size_of(keys)));
  return {products * bytes / kBytesPerUs, 2.0 * products / flops_per_us(isa, keys),
          4.0 * static_cast<double>(partial_row_floats(head_dim_v)) / kPartialBytesPerUs,
          takes_tiles(isa, keys)    ? 16
          : isa >= IsaLevel::avx512 ? 12
                                    : 4};
}

PlanEstimate estimate(const AttentionPlan& plan, DType keys) {
  const IsaLevel isa = kernel_level(plan, kernel_kind(DType::bf16, keys, keys));
  const UnitCost cost = unit_cost(isa, keys, plan.head_dim_qk, plan.head_dim_v);
  const std::int64_t group = plan.num_q_heads / plan.num_kv_heads;
  PlanEstimate e;
  for (const WorkUnit& u : plan.units) {
    const double pieces = u.piece_end - u.piece_begin;
    e.read_us += pieces * cost.read_us;
    e.products_us += pieces * cost.products_us((u.q_end - u.q_begin) * group);
  }
  e.merge_us = static_cast<double>(plan.num_partial_rows) * cost.partial_us;
  return e;
}

}  // namespace attend::plan
