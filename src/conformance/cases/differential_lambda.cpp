// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "attend/ops/differential.h"
#include "attend/oracle/differential.h"
#include "conformance/check.h"

namespace attend::conformance {
namespace {

class DifferentialLambdaCase final : public Case {
 public:
  explicit DifferentialLambdaCase(Rng& rng)
      : dim_(rng.range(0, 256)),
        lambda_init_(rng.chance(0.7) ? differential_lambda_init(rng.range(0, 60))
                                     : 4.0 * rng.bell()) {
    if (rng.chance(0.5)) round_to_ = rng.pick({DType::f32, DType::f16, DType::bf16});
    const DType dtype = rng.pick({DType::f32, DType::f16, DType::bf16});
    const double magnitude = rng.pick({0.1, 0.3});
    Layout layout;
    layout.padded = rng.chance(0.3);
    for (Storage& v : vectors_) {
      v = Storage(rng, dtype, {dim_, 1}, layout);
      v.set_random(rng, magnitude);
    }
  }

  Outcome run(const KernelOptions&, Executor&) override {
    const oracle::Number expected = oracle::differential_lambda(args());
    Outcome outcome;
    compare(outcome, differential_lambda(args()), expected.value, expected.bound,
            [] { return std::string("lambda"); });
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{} dim {} lambda_init {}{}", to_string(vectors_[0].view().dtype), dim_,
                       lambda_init_,
                       round_to_ ? fmt::format(" round_to {}", to_string(*round_to_)) : "");
  }

 private:
  DifferentialLambdaArgs args() const {
    const auto vector = [&](int i) { return vectors_[i].view().select(1, 0); };
    return {vector(0), vector(1), vector(2), vector(3), lambda_init_, round_to_};
  }

  std::int64_t dim_;
  double lambda_init_;
  std::optional<DType> round_to_;
  Storage vectors_[4];
};

}  // namespace

Op op_differential_lambda() {
  return {"differential_lambda", false,
          [](Rng& rng) { return std::make_unique<DifferentialLambdaCase>(rng); }};
}

}  // namespace attend::conformance
