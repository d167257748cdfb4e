// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>
#include <string_view>
#include <vector>

#include "attend/core/cpu.h"
#include "conformance/quant_scheme.h"

namespace attend::conformance {

/// An op that attends straight from the codes of a scheme.
struct QuantisedOp {
  std::string_view name;
  std::string_view scheme;  ///< name of the QuantScheme that it implements
  /// Quantises the data by the scheme and runs the op, with bf16 where nothing is quantised; output
  /// [queries, head_size].
  std::vector<double> (*run)(const AttentionData& data, const QuantScheme& scheme, IsaLevel isa,
                             Executor& executor);
};
std::span<const QuantisedOp> quantised_ops() noexcept;

}  // namespace attend::conformance
