// SPDX-License-Identifier: Apache-2.0
#include "conformance/quant_scheme.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <string>

#include "attend/core/error.h"
#include "attend/oracle/attention.h"
#include "attend/oracle/quantize.h"
#include "oracle/row.h"

namespace attend::conformance {
namespace {

constexpr int kGroup = 64;
constexpr int kWeightLevels = 127;

constexpr Quantiser int8_by(Sharing sharing) { return {DType::i8, sharing}; }

constexpr std::array kSchemes = {
    QuantScheme{.name = "int8 K per tensor", .k = int8_by(Sharing::tensor)},
    QuantScheme{.name = "int8 K per token", .k = int8_by(Sharing::token)},
    QuantScheme{.name = "int8 K per channel", .k = int8_by(Sharing::channel_group)},
    QuantScheme{.name = "int8 K smooth", .k = int8_by(Sharing::token), .smooth_k = true},
    QuantScheme{.name = "fp8_e4m3 KV per tensor",
                .k = {DType::fp8_e4m3, Sharing::tensor},
                .v = {DType::fp8_e4m3, Sharing::tensor}},
    QuantScheme{.name = "fp8_e4m3 KV per token",
                .k = {DType::fp8_e4m3, Sharing::token},
                .v = {DType::fp8_e4m3, Sharing::token}},
    QuantScheme{.name = "fp8_e5m2 KV per tensor",
                .k = {DType::fp8_e5m2, Sharing::tensor},
                .v = {DType::fp8_e5m2, Sharing::tensor}},
    QuantScheme{.name = "int8 level 1",
                .q = int8_by(Sharing::token),
                .k = int8_by(Sharing::token),
                .v = int8_by(Sharing::channel),
                .int8_weights = true},
    QuantScheme{.name = "int8 level 1, K smooth",
                .q = int8_by(Sharing::token),
                .k = int8_by(Sharing::token),
                .v = int8_by(Sharing::channel),
                .smooth_k = true,
                .int8_weights = true},
    QuantScheme{.name = "int8 level 2", .q = int8_by(Sharing::token), .k = int8_by(Sharing::token)},
    QuantScheme{.name = "int8 level 2, K smooth",
                .q = int8_by(Sharing::token),
                .k = int8_by(Sharing::token),
                .smooth_k = true},
    QuantScheme{.name = "int8 KV per token and head",
                .k = int8_by(Sharing::token),
                .v = int8_by(Sharing::token)},
};

float scale_of(std::span<const double> sharers, DType format) {
  if (format == DType::i8) return oracle::int8_scale(sharers);
  double amax = 0.0;
  for (const double x : sharers) amax = std::max(amax, std::abs(x));
  const double largest = format == DType::fp8_e4m3 ? 448.0 : 57344.0;
  return std::max(static_cast<float>(amax / largest), 1e-6F);
}

/// Index of the scale that an element shares.
std::size_t group_of(Sharing sharing, std::size_t row, std::size_t column, std::size_t columns) {
  switch (sharing) {
    case Sharing::tensor:
      break;
    case Sharing::token:
      return row;
    case Sharing::channel:
      return column;
    case Sharing::channel_group:
      return row / kGroup * columns + column;
  }
  return 0;
}

}  // namespace

std::span<const QuantScheme> quant_schemes() noexcept { return kSchemes; }

const QuantScheme& find_quant_scheme(std::string_view name) {
  std::string valid;
  for (const QuantScheme& s : kSchemes) {
    if (s.name == name) return s;
    valid += (valid.empty() ? "" : ", ") + std::string(s.name);
  }
  throw InvalidArgument("quant_scheme", "name", "one of " + valid, "'" + std::string(name) + "'");
}

QuantisedTensor quantise(std::span<const double> values, int columns, const Quantiser& quantiser) {
  const auto width = static_cast<std::size_t>(columns);
  const DType format = *quantiser.format;
  const auto group = [&](std::size_t i) {
    return group_of(quantiser.sharing, i / width, i % width, width);
  };
  std::vector<std::vector<double>> sharers(group(values.size() - 1) + 1);
  for (std::size_t i = 0; i < values.size(); ++i) sharers[group(i)].push_back(values[i]);
  QuantisedTensor t;
  for (const auto& members : sharers) t.scales.push_back(scale_of(members, format));
  t.codes.reserve(values.size());
  t.values.reserve(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float scale = t.scales[group(i)];
    double decoded = 0.0;
    if (format == DType::i8) {
      const std::int8_t code = oracle::int8_code(values[i], scale);
      t.codes.push_back(std::bit_cast<std::uint8_t>(code));
      decoded = code;
    } else {
      t.codes.push_back(oracle::fp8_code(format, values[i], scale));
      decoded = oracle::fp8_value(format, t.codes.back());
    }
    t.values.push_back(decoded * static_cast<double>(scale));
  }
  return t;
}

std::vector<float> subtract_mean(std::vector<double>& rows, int columns) {
  const auto width = static_cast<std::size_t>(columns);
  const auto count = static_cast<double>(rows.size() / width);
  std::vector<float> means;
  for (std::size_t c = 0; c < width; ++c) {
    double sum = 0.0;
    for (std::size_t i = c; i < rows.size(); i += width) sum += rows[i];
    means.push_back(static_cast<float>(sum / count));
    for (std::size_t i = c; i < rows.size(); i += width) {
      rows[i] -= static_cast<double>(means.back());
    }
  }
  return means;
}

AttentionData quantised(const AttentionData& data, const QuantScheme& scheme) {
  AttentionData result = data;
  const int columns = data.shape.head_size;
  if (scheme.smooth_k) subtract_mean(result.k, columns);
  if (scheme.q.format) result.q = quantise(result.q, columns, scheme.q).values;
  if (scheme.k.format) result.k = quantise(result.k, columns, scheme.k).values;
  if (scheme.v.format) result.v = quantise(result.v, columns, scheme.v).values;
  return result;
}

std::vector<double> exact_attention(const AttentionData& data, bool int8_weights,
                                    Executor& executor) {
  const int size = data.shape.head_size;
  const auto width = static_cast<std::size_t>(size);
  std::vector<double> out(static_cast<std::size_t>(data.shape.queries) * width);
  oracle::RowProblem p;
  p.head_dim_qk = p.head_dim_v = size;
  p.num_keys = data.shape.keys;
  p.scale = 1.0 / std::sqrt(static_cast<double>(size));
  p.causal = false;
  p.weight_levels = int8_weights ? kWeightLevels : 0;
  const auto element = [&](const std::vector<double>& rows, std::int64_t row, int d) {
    return rows[static_cast<std::size_t>(row) * width + static_cast<std::size_t>(d)];
  };
  executor.run([&](int worker) {
    for (int i = worker; i < data.shape.queries; i += executor.num_workers()) {
      const oracle::RowResult row = oracle::row(
          p, [&](int d) { return element(data.q, i, d); },
          [&](std::int64_t j, int d) { return element(data.k, j, d); },
          [&](std::int64_t j, int d) { return element(data.v, j, d); });
      std::copy(row.out.begin(), row.out.end(), out.begin() + i * std::ptrdiff_t{size});
    }
  });
  return out;
}

double relative_l1(std::span<const double> want, std::span<const double> got) {
  double difference = 0.0, total = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += std::abs(want[i] - got[i]);
    total += std::abs(want[i]);
  }
  return difference / total;
}

}  // namespace attend::conformance
