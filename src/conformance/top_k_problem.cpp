// SPDX-License-Identifier: Apache-2.0
#include "conformance/top_k_problem.h"

#include <fmt/format.h>

#include <limits>

#include "attend/oracle/top_k.h"

namespace attend::conformance {

namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
}  // namespace

TopKProblem::TopKProblem(Rng& rng, std::int64_t num_rows)
    : rows(num_rows),
      width(rng.chance(0.3) ? rng.range(std::int64_t{8000}, std::int64_t{40000})
                            : rng.range(std::int64_t{0}, std::int64_t{3000})),
      k(rng.pick({std::int64_t{1}, std::int64_t{5}, std::int64_t{64}, std::int64_t{512},
                  std::int64_t{2048}, std::int64_t{5000}})),
      values_(rng.range(0, 3)) {
  Layout layout;
  layout.padded = rng.chance(0.5);
  logits = Storage(rng, DType::f32, {rows, width}, layout);
  out = Storage(rng, DType::i32, {rows, k}, layout);
  out.freeze();
}

// Spread, a few different ones, the ends of the range among others, or nothing but one number.
double TopKProblem::next(Rng& rng) const {
  switch (values_) {
    case 0:
      return rng.normal();
    case 1:
      return rng.range(-3, 3);
    case 2:
      return rng.chance(0.3)
                 ? rng.pick({kInfinity, -kInfinity, kNan, 0.0, -0.0, 3e38, -3e38, 1e-40})
                 : rng.bell();
    default:
      return rng.chance(0.001) ? rng.normal() : -1.0;
  }
}

void TopKProblem::fill(Rng& rng, std::int64_t row, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) logits.set(logits.offset({row, i}), next(rng));
}

void TopKProblem::expect_row(std::int64_t row, std::int64_t begin, std::int64_t end) {
  std::vector<double> values;
  for (std::int64_t i = begin; i < end; ++i) values.push_back(logits.get(logits.offset({row, i})));
  std::vector<std::int64_t> indices(static_cast<std::size_t>(k));
  oracle::top_k(values, indices);
  std::int64_t to = out.offset({row, 0});
  for (const std::int64_t index : indices) out.expect_bits(to++, static_cast<std::uint64_t>(index));
}

Outcome TopKProblem::outcome() const {
  Outcome outcome;
  expect_undamaged(outcome, "out", out);
  return outcome;
}

std::string TopKProblem::describe() const {
  return fmt::format("{} of {} x {} logits of kind {}", k, rows, width, values_);
}

}  // namespace attend::conformance
