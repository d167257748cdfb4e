// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>

#include "attend/ops/differential.h"
#include "kernels/cpu/attention/attention.h"

/// What differential_attention and differential_combine share.
namespace attend::ops {

/// Heads and columns of a layer: v1 has two branches of kv heads and columns, v2 one.
struct PairShape {
  DifferentialVariant variant;
  HeadPairing pairing;
  std::int64_t tokens, heads, head_size;
  int branches() const noexcept { return variant == DifferentialVariant::v1 ? 2 : 1; }
  std::int64_t width() const noexcept { return branches() * head_size; }
};

/// Variant, pairing and number of heads against each other.
void check_pairing(std::string_view op, const PairShape& shape);

/// Everything about `combine`.
void check_combine(std::string_view op, const PairShape& shape, const DifferentialCombine& combine);

/// `out`, the combined result, which must be apart from what `combine` reads.
void check_combined(std::string_view op, const PairShape& shape, const DifferentialCombine& combine,
                    const TensorView& out);

/// @throws Unsupported for fast arithmetic.
void check_exact(std::string_view op, Arithmetic arithmetic);

/// Puts maps, pairs and what becomes of them into a problem.
void place_pairs(cpu::AttentionProblem& problem, const PairShape& shape,
                 const DifferentialCombine& combine);

}  // namespace attend::ops
