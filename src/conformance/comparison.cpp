// SPDX-License-Identifier: Apache-2.0
#include "conformance/comparison.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace attend::conformance {
namespace {

/// "[1, 0, 7]" from a row-major position.
std::string index_text(const ConstTensorView& t, std::size_t position) {
  std::vector<std::int64_t> index(static_cast<std::size_t>(t.rank));
  auto rest = static_cast<std::int64_t>(position);
  for (std::size_t dim = index.size(); dim-- > 0;) {
    index[dim] = rest % t.shape[dim];
    rest /= t.shape[dim];
  }
  return fmt::format("[{}]", fmt::join(index, ", "));
}

}  // namespace

void compare(Outcome& outcome, double got, double expected, double bound,
             const std::function<std::string()>& where) {
  if (got == expected) return;  // infinities too
  const double error = std::abs(got - expected);
  if (error <= bound) {
    outcome.worst_error = std::max(outcome.worst_error, error);
    outcome.worst_ratio = std::max(outcome.worst_ratio, error / bound);
    return;
  }
  const double infinity = std::numeric_limits<double>::infinity();
  const bool countable = std::isfinite(error);
  outcome.worst_error = std::max(outcome.worst_error, countable ? error : infinity);
  outcome.worst_ratio =
      std::max(outcome.worst_ratio, countable && bound > 0.0 ? error / bound : infinity);
  outcome.fail(fmt::format("{}: got {}, expected {} +- {}", where(), got, expected, bound));
}

void compare_written(Outcome& outcome, std::string_view name, Storage& got,
                     std::span<const double> expected, std::span<const double> bound) {
  const std::vector<std::int64_t> offsets = got.offsets();
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    compare(outcome, got.get(offsets[i]), expected[i], bound[i],
            [&] { return fmt::format("{}{}", name, index_text(got.view(), i)); });
    got.accept(offsets[i]);
  }
  expect_undamaged(outcome, name, got);
}

void expect_undamaged(Outcome& outcome, std::string_view name, const Storage& storage) {
  if (const std::string damage = storage.damage(); !damage.empty()) {
    outcome.fail(fmt::format("memory around {}: {}", name, damage));
  }
}

}  // namespace attend::conformance
