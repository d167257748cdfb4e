// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "attend/ops/differential.h"
#include "attend/oracle/differential.h"
#include "conformance/check.h"
#include "conformance/differential_problem.h"

namespace attend::conformance {
namespace {

class DifferentialCombineCase final : public Case {
 public:
  explicit DifferentialCombineCase(Rng& rng) {
    const auto any_float = [&] { return rng.pick({DType::f32, DType::f16, DType::bf16}); };
    const bool v1 = rng.chance(0.7);
    const int tokens = rng.range(0, 40), heads = 2 * rng.range(1, 6), dim = 8 * rng.range(1, 32);
    const int width = v1 ? 2 * dim : dim;
    combine_ = DifferentialCombineProblem(
        rng, v1 ? DifferentialVariant::v1 : DifferentialVariant::v2, tokens, heads, width);
    Layout rows;
    rows.padded = rng.chance(0.4);
    if (rng.chance(0.3)) rows.order = {1, 0, 2};
    maps_ = Storage(rng, any_float(), {tokens, heads, width}, rows);
    maps_.set_random(rng, rng.pick({1.0, 0.001, 100.0}));
    // Maps that nearly cancel, and rows that saw no key.
    for (std::int64_t t = 0; t < tokens; ++t) {
      if (rng.chance(0.1)) make_alike(rng, t, heads, width);
    }
    out_ = Storage(rng, any_float(), {tokens, v1 ? heads : heads / 2, dim}, rows);
    out_.freeze();
    expected_ = oracle::differential_combine(args());
    maps_.freeze();
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    maps_.reset();
    out_.reset();
    differential_combine(args(), &executor, kernels);
    Outcome outcome;
    compare_written(outcome, "out", out_, expected_.out, expected_.out_bound);
    expect_undamaged(outcome, "maps", maps_);
    return outcome;
  }

  std::string describe() const override {
    const TensorView& m = maps_.view();
    return fmt::format("maps {} tokens {} heads {} width {} out {}{}", to_string(m.dtype),
                       m.shape[0], m.shape[1], m.shape[2], to_string(out_.view().dtype),
                       combine_.describe());
  }

 private:
  void make_alike(Rng& rng, std::int64_t token, std::int64_t heads, std::int64_t width) {
    const double size = rng.chance(0.5) ? 0.0 : 1.0;
    for (std::int64_t d = 0; d < width; ++d) {
      const double value = size * rng.bell();
      for (std::int64_t h = 0; h < heads; ++h) maps_.set(maps_.offset({token, h, d}), value);
    }
  }

  DifferentialCombineArgs args() const {
    DifferentialCombineArgs a;
    a.maps = maps_.view();
    a.out = out_.view();
    a.variant = combine_.variant;
    a.pairing = combine_.pairing;
    a.combine = combine_.args();
    return a;
  }

  DifferentialCombineProblem combine_;
  Storage maps_, out_;
  oracle::Result expected_;
};

}  // namespace

Op op_differential_combine() {
  return {"differential_combine", true,
          [](Rng& rng) { return std::make_unique<DifferentialCombineCase>(rng); }};
}

}  // namespace attend::conformance
