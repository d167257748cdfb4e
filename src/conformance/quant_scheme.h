// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "attend/core/dtype.h"
#include "attend/core/executor.h"
#include "conformance/attention_data.h"

/// How queries, keys, values and weights may be quantised, and what it costs in accuracy: float64
/// arithmetic on the codes and scales that the formats define (oracle/quantize.h).
namespace attend::conformance {

/// What shares a scale.
enum class Sharing : std::uint8_t {
  tensor,         ///< everything
  token,          ///< a row
  channel,        ///< a column
  channel_group,  ///< a column of 64 consecutive rows
};

/// Codes of one tensor. No format = left as it is, in 16 bits.
struct Quantiser {
  std::optional<DType> format = std::nullopt;  ///< i8, fp8_e4m3 or fp8_e5m2
  Sharing sharing = Sharing::tensor;
};

struct QuantScheme {
  std::string_view name;
  Quantiser q = {}, k = {}, v = {};
  bool smooth_k = false;  ///< the mean of all keys is subtracted first, which no weight notices
  /// Weights become round(127 * exp(logit - m)), m being the largest logit of the 256 keys, and
  /// their sum is that of the rounded ones.
  bool int8_weights = false;
};

std::span<const QuantScheme> quant_schemes() noexcept;
/// @throws InvalidArgument listing the valid names.
const QuantScheme& find_quant_scheme(std::string_view name);

/// Codes and scales of [rows, columns].
struct QuantisedTensor {
  std::vector<std::uint8_t> codes;  ///< [rows, columns]; bit patterns of the format
  std::vector<float> scales;        ///< [1], [rows], [columns] or [ceil(rows / 64), columns]
  std::vector<double> values;       ///< [rows, columns] code * scale
};
/// @pre `quantiser.format` is set, values are finite.
QuantisedTensor quantise(std::span<const double> values, int columns, const Quantiser& quantiser);

/// Subtracts from every row of [rows, columns] the mean of all rows, rounded to float32; returns
/// it, [columns].
std::vector<float> subtract_mean(std::vector<double>& rows, int columns);

/// The data as attention sees it under a scheme.
AttentionData quantised(const AttentionData& data, const QuantScheme& scheme);

/// Float64 attention of every query to all keys, [queries, head_size].
std::vector<double> exact_attention(const AttentionData& data, bool int8_weights,
                                    Executor& executor);

/// Sum of |want - got| over the sum of |want|.
double relative_l1(std::span<const double> want, std::span<const double> got);

}  // namespace attend::conformance
