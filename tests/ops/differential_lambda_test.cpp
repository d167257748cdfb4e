// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <cmath>
#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "attend/ops/differential.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

using ::testing::HasSubstr;

constexpr std::int64_t kDim = 64;

/// Four vectors of a layer, as their models draw them.
struct Vectors {
  HostTensor q1, k1, q2, k2;

  explicit Vectors(DType dtype = DType::f32, std::uint64_t seed = 5)
      : q1(dtype, {kDim}), k1(dtype, {kDim}), q2(dtype, {kDim}), k2(dtype, {kDim}) {
    Rng rng(seed);
    for (HostTensor* v : {&q1, &k1, &q2, &k2}) v->fill_normal(rng, seed % 2 == 1 ? 0.1F : 0.3F);
  }
  DifferentialLambdaArgs args() const {
    DifferentialLambdaArgs a;
    a.lambda_q1 = q1;
    a.lambda_k1 = k1;
    a.lambda_q2 = q2;
    a.lambda_k2 = k2;
    a.lambda_init = differential_lambda_init(3);
    return a;
  }
  static double exp_of(const HostTensor& q, const HostTensor& k) {
    double sum = 0.0;
    for (std::int64_t d = 0; d < kDim; ++d) sum += get(q, {d}) * get(k, {d});
    return std::exp(sum);
  }
};

TEST(DifferentialLambda, IsTheDifferenceOfTwoExponentialsAndAConstant) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const Vectors v(dtype);
    const double expected =
        Vectors::exp_of(v.q1, v.k1) - Vectors::exp_of(v.q2, v.k2) + differential_lambda_init(3);
    EXPECT_NEAR(differential_lambda(v.args()), expected, 2e-6);
  }
}

TEST(DifferentialLambda, OptionReproducesTheRoundingOfTheSeed) {
  const auto bf16_of = [](double x) { return to_f32(from_f32<bf16>(static_cast<float>(x))); };
  int changed = 0;
  for (std::uint64_t seed = 1; seed <= 400; ++seed) {
    const Vectors v(DType::f32, seed);
    DifferentialLambdaArgs a = v.args();
    const float unrounded = differential_lambda(a);
    const float difference =
        bf16_of(bf16_of(Vectors::exp_of(v.q1, v.k1)) - bf16_of(Vectors::exp_of(v.q2, v.k2)));
    const float expected = bf16_of(difference + static_cast<float>(a.lambda_init));
    a.round_to = DType::bf16;
    EXPECT_EQ(differential_lambda(a), expected) << "seed " << seed;
    changed += unrounded != expected;
    a.round_to = DType::f32;
    EXPECT_EQ(differential_lambda(a), unrounded) << "seed " << seed;
  }
  EXPECT_GT(changed, 350);
}

TEST(DifferentialLambda, DoesNotDependOnStrides) {
  const Vectors v;
  HostTensor spread(DType::f32, {kDim, 3});
  for (std::int64_t d = 0; d < kDim; ++d)
    spread.as<float>()[static_cast<std::size_t>(3 * d)] =
        v.q1.as<float>()[static_cast<std::size_t>(d)];
  DifferentialLambdaArgs a = v.args();
  a.lambda_q1 = spread.view().select(1, 0);
  EXPECT_EQ(differential_lambda(a), differential_lambda(v.args()));
}

TEST(DifferentialLambda, InitGrowsWithDepth) {
  EXPECT_DOUBLE_EQ(differential_lambda_init(0), 0.2);
  EXPECT_NEAR(differential_lambda_init(1), 0.35550907, 1e-8);
  EXPECT_NEAR(differential_lambda_init(200), 0.8, 1e-12);
  EXPECT_THROW(differential_lambda_init(-1), InvalidArgument);
}

// Argument that the error names, and its words.
std::string refusal(const std::function<void(Vectors&, DifferentialLambdaArgs&)>& spoil) {
  Vectors v;
  DifferentialLambdaArgs a = v.args();
  spoil(v, a);
  try {
    differential_lambda(a);
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.op(), "differential_lambda");
    return e.argument() + ": " + e.what();
  }
  return "none";
}

TEST(DifferentialLambda, StatesWhatIsWrong) {
  using A = DifferentialLambdaArgs;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto starts = [](const char* name) { return ::testing::StartsWith(name); };
  EXPECT_THAT(refusal([](Vectors&, A& a) { a.lambda_q2 = {}; }), starts("lambda_q2: "));
  EXPECT_THAT(refusal([](Vectors&, A& a) { a.lambda_q1.dtype = DType::i32; }),
              starts("lambda_q1: "));
  EXPECT_THAT(refusal([](Vectors&, A& a) { a.lambda_k1.dtype = DType::bf16; }),
              starts("lambda_k1: "));
  EXPECT_THAT(refusal([](Vectors&, A& a) { a.lambda_k2.shape[0] = 32; }), starts("lambda_k2: "));
  EXPECT_THAT(refusal([](Vectors&, A& a) { a.lambda_k1.rank = 0; }), starts("lambda_k1: "));
  EXPECT_THAT(refusal([](Vectors& v, A&) { v.k2.as<float>()[7] = std::nanf(""); }),
              HasSubstr("nan at index 7"));
  EXPECT_THAT(refusal([](Vectors& v, A&) { v.q1.as<float>()[0] = kInf; }),
              HasSubstr("inf at index 0"));
  EXPECT_THAT(refusal([](Vectors&, A& a) { a.lambda_init = kInf; }), starts("lambda_init: "));
  EXPECT_THAT(refusal([](Vectors&, A& a) { a.round_to = DType::fp8_e4m3; }), starts("round_to: "));
  // Finite vectors whose exponential is not, in float32 or in what it is rounded to.
  EXPECT_THAT(refusal([](Vectors& v, A&) {
                v.q2.fill([] { return 2.0F; });
                v.k2.fill([] { return 2.0F; });
              }),
              starts("lambda_q2: "));
  EXPECT_THAT(refusal([](Vectors& v, A& a) {
                v.q1.fill([] { return 0.5F; });
                v.k1.fill([] { return 0.5F; });
                a.round_to = DType::f16;
              }),
              starts("lambda_q1: "));
}

}  // namespace
}  // namespace attend::testing
