// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "attend/oracle/indexer.h"
#include "oracle/bounds.h"
#include "oracle/element.h"

// Derivation of the bounds: docs/numerics.md, section "Indexer".
namespace attend::oracle {
namespace {

constexpr std::size_t kDim = indexer_cache::kDim, kPairs = 32;
constexpr double kFloat64Error = 0x1p-45;  // of sums of 128 float64 numbers, generously

/// A number of which the computed one may be off.
struct Near {
  double value = 0.0, bound = 0.0;
};
using Row = std::array<Near, kDim>;

double as_f32(double x) { return round_to(DType::f32, x); }
double stored(DType t, double x) { return round_to(t, as_f32(x)); }

/// How far apart what is rounded and what it is rounded to may be, given an error before that.
Near rounded(DType t, double value, double error) {
  const double result = stored(t, value);
  const double low = stored(t, value - error), high = stored(t, value + error);
  return {result, std::max(high - result, result - low)};
}

/// Rotates the first 64 elements: exactly as the definition says, products and sum in float32.
void rotate(const PrepareIndexerArgs& a, std::int64_t token, Row& row) {
  const auto position = static_cast<const std::int64_t*>(a.positions.data)[token];
  for (std::size_t i = 0; i < kPairs; ++i) {
    Near& first = row[a.is_neox ? i : 2 * i];
    Near& second = row[a.is_neox ? i + kPairs : 2 * i + 1];
    const auto column = static_cast<std::int64_t>(i);
    const double c = at(a.cos_sin_cache, {position, column});
    const double s = at(a.cos_sin_cache, {position, column + 32});
    const double x = first.value, y = second.value;
    const auto turned = [&](double from_first, double from_second, double sum) {
      const double error =
          std::abs(from_first) * first.bound + std::abs(from_second) * second.bound;
      const double products = std::abs(from_first * x) + std::abs(from_second * y);
      return rounded(a.q.dtype, sum,
                     error == 0.0 ? 0.0 : error * (1.0 + 8 * kUnit) + 4 * kUnit * products);
    };
    const Near left = turned(c, s, as_f32(x * c) - as_f32(y * s));
    second = turned(s, c, as_f32(x * s) + as_f32(y * c));
    first = left;
  }
}

/// The Hadamard matrix times 128^-0.5, by its definition: the sign is that of the number of ones in
/// row & column. Seven roundings of sums, each of no more than the sum of all magnitudes.
void transform(DType t, Row& row) {
  const Row from = row;
  double size = 0.0, error = 0.0;
  for (const Near& x : from) {
    size += std::abs(x.value);
    error += x.bound;
  }
  const double scale = 1.0 / std::sqrt(static_cast<double>(kDim));
  for (std::size_t r = 0; r < kDim; ++r) {
    double sum = 0.0;
    for (std::size_t c = 0; c < kDim; ++c)
      sum += std::popcount(r & c) % 2 == 0 ? from[c].value : -from[c].value;
    row[r] = rounded(t, scale * sum, scale * (error + kSafety * 10 * kUnit * size));
  }
}

void normalise(const PrepareIndexerArgs& a, Row& row) {
  double mean = 0.0, variance = 0.0, size = 0.0;
  for (const Near& x : row) mean += x.value / kDim;
  for (const Near& x : row) {
    variance += (x.value - mean) * (x.value - mean) / kDim;
    size = std::max(size, std::abs(x.value));
  }
  const double factor = 1.0 / std::sqrt(variance + static_cast<double>(a.k_norm_eps));
  for (std::size_t i = 0; i < kDim; ++i) {
    const auto at_i = static_cast<std::int64_t>(i);
    const double weight = at(a.k_norm_weight, {at_i}), bias = at(a.k_norm_bias, {at_i});
    const double x = (row[i].value - mean) * factor * weight + bias;
    const double error = kFloat64Error * (2.0 * size * factor * std::abs(weight) + std::abs(bias));
    row[i] = rounded(a.q.dtype, x, error);
  }
}

void append(const Row& row, std::vector<double>& values, std::vector<double>& bounds) {
  for (const Near& x : row) {
    values.push_back(x.value);
    bounds.push_back(x.bound);
  }
}

}  // namespace

PreparedIndexer prepare_indexer(const PrepareIndexerArgs& a) {
  const std::int64_t heads = a.q_codes.shape[1];
  PreparedIndexer result;
  for (std::int64_t t = 0; t < a.positions.shape[0]; ++t) {
    Row row;
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t d = 0; d < indexer_cache::kDim; ++d) {
        const double x =
            a.q.rank == 3 ? at(a.q, {t, h, d}) : at(a.q, {t, h * indexer_cache::kDim + d});
        row[static_cast<std::size_t>(d)] = {x, 0.0};
      }
      rotate(a, t, row);
      if (a.hadamard) transform(a.q.dtype, row);
      append(row, result.q, result.q_bound);
    }
    for (std::int64_t d = 0; d < indexer_cache::kDim; ++d)
      row[static_cast<std::size_t>(d)] = {at(a.k, {t, d}), 0.0};
    normalise(a, row);
    rotate(a, t, row);
    if (a.hadamard) transform(a.q.dtype, row);
    append(row, result.k, result.k_bound);
  }
  return result;
}

float indexer_query(std::span<const double> query, bool power_of_two,
                    std::span<std::uint8_t> codes) noexcept {
  double amax = static_cast<double>(1e-10F);
  for (const double x : query) {
    if (std::isfinite(x)) amax = std::max(amax, std::abs(x));
  }
  auto scale = static_cast<float>(amax / 448.0);
  if (power_of_two) scale = std::exp2(std::ceil(std::log2(scale)));
  for (std::size_t i = 0; i < query.size(); ++i) {
    const int sign = std::signbit(query[i]) ? 0x80 : 0;
    codes[i] = std::isfinite(query[i]) ? fp8_code(DType::fp8_e4m3, query[i], scale)
                                       : static_cast<std::uint8_t>(sign | 0x7F);
  }
  return scale;
}

}  // namespace attend::oracle
