// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "oracle/bounds.h"
#include "oracle/element.h"

/// The matrix products of an MLA layer: float32 sums of products of numbers of the layer's dtype.
namespace attend::oracle {

/// Most elements that a product adds in an order of its own before they join the chain.
inline constexpr int kProductBlock = 32;
/// Roundings that one product of two elements goes through outside of that chain.
inline constexpr double kProductRoundings = 40;

/// Stored by rows, so that one element of a vector meets a row.
class Matrix {
 public:
  /// `element(i, c)`: 0 <= i < num_terms, 0 <= c < num_columns.
  template <typename Element>
  Matrix(int num_terms, int num_columns, const Element& element)
      : terms(num_terms), columns(num_columns), squares_(static_cast<std::size_t>(num_columns)) {
    for (int i = 0; i < terms; ++i) {
      for (int c = 0; c < columns; ++c) {
        const double x = element(i, c);
        values_.push_back(x);
        squares_[static_cast<std::size_t>(c)] += x * x;
      }
    }
  }
  double at(int i, int c) const {
    return values_[static_cast<std::size_t>(i) * static_cast<std::size_t>(columns) +
                   static_cast<std::size_t>(c)];
  }
  /// Sum of the squares of a column.
  double squares(int c) const { return squares_[static_cast<std::size_t>(c)]; }

  const int terms, columns;

 private:
  std::vector<double> values_, squares_;
};

/// x W and what its error in float32 is proportional to.
struct Product {
  std::vector<double> values;
  /// At least the sum of the products' absolute values, plus the absolute values of the sums of the
  /// first 32, 64, 96 ... products.
  std::vector<double> magnitudes;
};

inline Product multiply(const Matrix& w, const std::vector<double>& x) {
  const auto columns = static_cast<std::size_t>(w.columns);
  Product p{std::vector<double>(columns), std::vector<double>(columns)};
  double squares = 0.0;
  for (int i = 0; i < w.terms; ++i) {
    const double factor = x[static_cast<std::size_t>(i)];
    squares += factor * factor;
    for (int c = 0; c < w.columns; ++c)
      p.values[static_cast<std::size_t>(c)] += factor * w.at(i, c);
    if ((i + 1) % kProductBlock != 0 && i + 1 != w.terms) continue;
    for (std::size_t c = 0; c < columns; ++c) p.magnitudes[c] += std::abs(p.values[c]);
  }
  for (int c = 0; c < w.columns; ++c)
    p.magnitudes[static_cast<std::size_t>(c)] += std::sqrt(squares * w.squares(c));
  return p;
}

/// Error of column c in float32, before it is rounded to the layer's dtype.
inline double product_error(const Product& p, int c) {
  return kSafety * kProductRoundings * kUnit * p.magnitudes[static_cast<std::size_t>(c)];
}

/// Numbers as a layer keeps them, and how far a layer's may be from them because its float32 sum
/// rounds to another number: mostly 0 for 16 bits.
struct Rounded {
  std::vector<double> values, doubts;
};

inline Rounded round_product(const Product& p, DType dtype) {
  Rounded r;
  for (std::size_t c = 0; c < p.values.size(); ++c) {
    const double exact = p.values[c], error = product_error(p, static_cast<int>(c));
    const double value = round_to(dtype, exact);
    r.values.push_back(value);
    r.doubts.push_back(
        std::max(round_to(dtype, exact + error) - value, value - round_to(dtype, exact - error)));
  }
  return r;
}

}  // namespace attend::oracle
