// SPDX-License-Identifier: Apache-2.0
#include "ops/differential_checks.h"

#include <cmath>

#include "core/check.h"

namespace attend::ops {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::f16, DType::bf16};

void check_token_lambda(std::string_view op, const PairShape& shape, const ConstTensorView& t) {
  const check::Where where{op, "token_lambda"};
  const bool wanted = shape.variant == DifferentialVariant::v2;
  check::require(t.defined() == wanted, where,
                 wanted ? "a tensor: variant v2 has a lambda for each token and pair"
                        : "undefined: variant v1 has one lambda for all",
                 wanted ? "an undefined tensor" : "a tensor");
  if (!wanted) return;
  check::tensor(where, t, 2, kFloats);
  check::shape(where, t, {shape.tokens, shape.heads / 2});
}

void check_norm(std::string_view op, const PairShape& shape, const DifferentialCombine& c) {
  check::require(shape.variant == DifferentialVariant::v1 || !c.norm, {op, "norm"},
                 "false: variant v2 has no norm", "true");
  const check::Where weight{op, "norm_weight"};
  check::require(c.norm || !c.norm_weight.defined(), weight, "undefined: there is no norm",
                 "a tensor");
  if (!c.norm) return;
  check::require(std::isfinite(c.norm_eps) && c.norm_eps > 0.0F, {op, "norm_eps"},
                 "a finite value > 0", c.norm_eps);
  if (!c.norm_weight.defined()) return;
  check::tensor(weight, c.norm_weight, 1, kFloats);
  check::shape(weight, c.norm_weight, {shape.width()});
  check::unit_last_stride(weight, c.norm_weight);
}

}  // namespace

void check_pairing(std::string_view op, const PairShape& shape) {
  check::require(
      shape.variant == DifferentialVariant::v1 || shape.pairing == HeadPairing::interleaved,
      {op, "pairing"}, "interleaved: the pairs of variant v2 share a kv head", "halves");
  check::require(shape.heads > 0 && shape.heads % 2 == 0, {op, "q"},
                 "an even number of heads, which are pairs", shape.heads);
}

void check_combine(std::string_view op, const PairShape& shape, const DifferentialCombine& c) {
  check_token_lambda(op, shape, c.token_lambda);
  if (!c.token_lambda.defined())
    check::require(std::isfinite(c.lambda), {op, "lambda"}, "a finite value", c.lambda);
  check_norm(op, shape, c);
  check::require(std::isfinite(c.out_scale), {op, "out_scale"}, "a finite value", c.out_scale);
}

void check_combined(std::string_view op, const PairShape& shape, const DifferentialCombine& c,
                    const TensorView& out) {
  const check::Where where{op, "out"};
  const std::int64_t heads = shape.heads / 2 * shape.branches();
  check::shape(where, out, {shape.tokens, heads, shape.head_size});
  check::unit_last_stride(where, out);
  check::distinct_elements(where, out);
  if (c.token_lambda.defined()) check::no_overlap(where, out, "token_lambda", c.token_lambda);
  if (c.norm_weight.defined()) check::no_overlap(where, out, "norm_weight", c.norm_weight);
}

void check_exact(std::string_view op, Arithmetic arithmetic) {
  if (arithmetic != Arithmetic::fast) return;
  throw Unsupported(
      fmt::format("[{}] argument 'arithmetic': expected automatic or exact, got fast", op),
      {"there are no fast kernels for two maps"});
}

void place_pairs(cpu::AttentionProblem& p, const PairShape& shape, const DifferentialCombine& c) {
  p.maps = 2;
  p.branches = shape.branches();
  p.head_dim_v = static_cast<int>(shape.head_size);
  cpu::DifferentialTerms& terms = p.differential;
  if (shape.pairing == HeadPairing::halves) {
    terms.pair_step = 1;
    terms.map_step = static_cast<int>(shape.heads / 2);
  }
  cpu::PairTerms& pair = terms.pair;
  pair.lambda = c.lambda;
  if (c.token_lambda.defined()) {
    pair.token_lambda = c.token_lambda.data;
    pair.token_lambda_dtype = c.token_lambda.dtype;
    pair.token_lambda_stride_token = c.token_lambda.strides[0];
    pair.token_lambda_stride_pair = c.token_lambda.strides[1];
  }
  pair.norm = c.norm;
  pair.norm_weight = c.norm_weight.data;
  pair.norm_weight_dtype = c.norm_weight.dtype;
  pair.norm_eps = c.norm_eps;
  pair.out_scale = c.out_scale;
}

}  // namespace attend::ops
