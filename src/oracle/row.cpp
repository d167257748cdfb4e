// SPDX-License-Identifier: Apache-2.0
#include "oracle/row.h"

#include "attend/plan/attention_plan.h"

namespace attend::oracle {

void round_weights(const RowProblem& p, std::int64_t first_key, double relative_error,
                   std::vector<double>& weights, std::vector<double>& doubtful) {
  const double levels = p.weight_levels;
  doubtful.assign(weights.size(), 0.0);
  for (std::size_t begin = 0; begin < weights.size();) {
    const std::int64_t piece = (first_key + static_cast<std::int64_t>(begin)) / kPieceSize;
    const std::size_t end =
        std::min(weights.size(), static_cast<std::size_t>((piece + 1) * kPieceSize - first_key));
    double largest = 0.0;
    for (std::size_t j = begin; j < end; ++j) largest = std::max(largest, weights[j]);
    for (std::size_t j = begin; j < end && largest > 0.0; ++j) {
      const double exact = weights[j] / largest * levels;
      const double from_boundary = std::abs(exact - std::floor(exact) - 0.5);
      if (from_boundary <= 2.0 * relative_error * exact) doubtful[j] = largest / levels;
      weights[j] = std::nearbyint(exact) / levels * largest;
    }
    begin = end;
  }
}

RowResult attention_row(const RowProblem& p) { return row(p, p.q, p.k, p.v); }

}  // namespace attend::oracle
