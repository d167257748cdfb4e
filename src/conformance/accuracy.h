// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "conformance/attention_data.h"
#include "conformance/quant_scheme.h"
#include "conformance/quantised_op.h"

/// What quantisation costs, as sum |O - O'| / sum |O| against float64 attention without it.
namespace attend::conformance {

/// The arithmetic of an op may add so much to the error of its codes and scales.
inline constexpr double kMostOverArithmetic = 1.2;

struct AccuracyOptions {
  DataShape shape;
  std::uint64_t seed = 1;
  Executor* executor = nullptr;  ///< null = default_executor()
  /// Called before each of `total` evaluations with the number of those behind.
  std::function<void(int done, int total, std::string_view what)> progress;
};

struct SchemeAccuracy {
  DataKind data{};
  std::string_view scheme;
  double error = 0.0;  ///< of float64 arithmetic on the codes and scales
};

struct OpAccuracy {
  DataKind data{};
  std::string_view op, scheme;
  IsaLevel isa{};
  double error = 0.0;            ///< of the op
  double over_arithmetic = 0.0;  ///< error / SchemeAccuracy::error
  bool passed() const noexcept { return over_arithmetic <= kMostOverArithmetic; }
};

struct AccuracyReport {
  std::vector<SchemeAccuracy> schemes;  ///< every kind of data with every scheme
  std::vector<OpAccuracy> ops;          ///< every op on the active ISA level

  /// @pre the report has it.
  double error(DataKind data, std::string_view scheme) const;
};

/// Measures every scheme and op on every kind of data.
/// @throws InvalidArgument for a shape out of range.
AccuracyReport measure_accuracy(const AccuracyOptions& options);

}  // namespace attend::conformance
