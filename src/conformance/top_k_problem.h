// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "conformance/check.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// Rows of logits of which the highest are chosen.
struct TopKProblem {
  /// The logits are as long as the longest row; rows * width is no more than a few 100000.
  TopKProblem(Rng& rng, std::int64_t num_rows);

  /// Fills a row's logits [begin, end), the only ones that are no NaN by poison.
  void fill(Rng& rng, std::int64_t row, std::int64_t begin, std::int64_t end);
  /// Expects the oracle's choice.
  void expect_row(std::int64_t row, std::int64_t begin, std::int64_t end);
  Outcome outcome() const;
  std::string describe() const;

  std::int64_t rows, width, k;
  Storage logits, out;

 private:
  double next(Rng& rng) const;

  int values_;  ///< kind of logits
};

}  // namespace attend::conformance
