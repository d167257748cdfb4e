// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cmath>

#include "attend/core/float_types.h"
#include "attend/ops/differential.h"
#include "core/check.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "differential_lambda";

float element(const ConstTensorView& t, std::int64_t i) noexcept {
  const std::int64_t at = i * t.strides[0];
  switch (t.dtype) {
    case DType::f16:
      return to_f32(t.as<f16>()[at]);
    case DType::bf16:
      return to_f32(t.as<bf16>()[at]);
    default:
      return t.as<float>()[at];
  }
}

void require_vector(std::string_view name, const ConstTensorView& t, const ConstTensorView& first) {
  const check::Where where{kOp, name};
  check::require(t.defined(), where, "a vector", "an undefined view");
  check::tensor(where, t, 1, {DType::f32, DType::f16, DType::bf16});
  check::require(
      t.dtype == first.dtype && t.shape[0] == first.shape[0], where,
      [&] { return fmt::format("the type and size of lambda_q1, {}", describe(first)); },
      [&] { return describe(t); });
  for (std::int64_t i = 0; i < t.shape[0]; ++i) {
    const float x = element(t, i);
    check::require(std::isfinite(x), where, "finite elements",
                   [&] { return fmt::format("{} at index {}", x, i); });
  }
}

void validate(const DifferentialLambdaArgs& a) {
  require_vector("lambda_q1", a.lambda_q1, a.lambda_q1);
  require_vector("lambda_k1", a.lambda_k1, a.lambda_q1);
  require_vector("lambda_q2", a.lambda_q2, a.lambda_q1);
  require_vector("lambda_k2", a.lambda_k2, a.lambda_q1);
  check::require(std::isfinite(a.lambda_init), {kOp, "lambda_init"}, "a finite value",
                 a.lambda_init);
  const DType to = a.round_to.value_or(DType::f32);
  check::require(to == DType::f32 || to == DType::f16 || to == DType::bf16, {kOp, "round_to"},
                 "f32, f16 or bf16", [&] { return to_string(to); });
}

float rounded(float x, DType type) noexcept {
  switch (type) {
    case DType::f16:
      return to_f32(from_f32<f16>(x));
    case DType::bf16:
      return to_f32(from_f32<bf16>(x));
    default:
      return x;
  }
}

// Summed by index, so that the result does not depend on the strides.
float dot(const ConstTensorView& a, const ConstTensorView& b) noexcept {
  float sum = 0.0F;
  for (std::int64_t i = 0; i < a.shape[0]; ++i) sum += element(a, i) * element(b, i);
  return sum;
}

}  // namespace

float differential_lambda(const DifferentialLambdaArgs& a) {
  validate(a);
  const DType type = a.round_to.value_or(DType::f32);
  const auto exp_of = [&](std::string_view name, const ConstTensorView& q,
                          const ConstTensorView& k) {
    const float product = dot(q, k);
    const float weight = rounded(std::exp(product), type);
    check::require(
        std::isfinite(weight), {kOp, name},
        [&] { return fmt::format("a product whose exponential is a finite {}", to_string(type)); },
        product);
    return weight;
  };
  const float first = exp_of("lambda_q1", a.lambda_q1, a.lambda_k1);
  const float second = exp_of("lambda_q2", a.lambda_q2, a.lambda_k2);
  const float lambda =
      rounded(rounded(first - second, type) + static_cast<float>(a.lambda_init), type);
  check::require(
      std::isfinite(lambda), {kOp, "lambda_init"},
      [&] { return fmt::format("a sum that is a finite {}", to_string(type)); },
      [&] { return fmt::format("{} - {} + {}", first, second, a.lambda_init); });
  return lambda;
}

double differential_lambda_init(int layer) {
  check::require(layer >= 0, {"differential_lambda_init", "layer"}, "an index >= 0", layer);
  return 0.8 - 0.6 * std::exp(-0.3 * layer);
}

}  // namespace attend
