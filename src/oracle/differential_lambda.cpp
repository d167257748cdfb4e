// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "attend/oracle/differential.h"
#include "oracle/bounds.h"
#include "oracle/element.h"

// Derivation of the bounds: docs/numerics.md, section "Differential attention".
namespace attend::oracle {
namespace {

constexpr double kExpError = 0x1p-22;  ///< relative error of the C library's expf

/// Counts rounding to float32, then to `type`.
void count_rounding(Number& x, DType type) {
  x.bound += rounding_error(DType::f32, std::abs(x.value) + x.bound);
  if (type != DType::f32) x.bound += rounding_error(type, std::abs(x.value) + x.bound);
}

Number exp_of_product(const ConstTensorView& q, const ConstTensorView& k, DType type) {
  double sum = 0.0, magnitude = 0.0;
  for (std::int64_t d = 0; d < q.shape[0]; ++d) {
    const double product = at(q, {d}) * at(k, {d});
    sum += product;
    magnitude += std::abs(product);
  }
  const double terms = static_cast<double>(q.shape[0]) + 1;
  Number x{std::exp(sum), 0.0};
  x.bound = x.value * std::expm1(kSafety * (terms * kUnit * magnitude + kExpError));
  count_rounding(x, type);
  return x;
}

}  // namespace

Number differential_lambda(const DifferentialLambdaArgs& a) {
  const DType type = a.round_to.value_or(DType::f32);
  const Number first = exp_of_product(a.lambda_q1, a.lambda_k1, type);
  const Number second = exp_of_product(a.lambda_q2, a.lambda_k2, type);
  Number lambda{first.value - second.value, first.bound + second.bound};
  count_rounding(lambda, type);
  lambda.value += a.lambda_init;
  lambda.bound += rounding_error(DType::f32, std::abs(a.lambda_init));
  count_rounding(lambda, type);
  return lambda;
}

}  // namespace attend::oracle
