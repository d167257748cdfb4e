// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/attention.h"
#include "conformance/check.h"
#include "conformance/int8_problem.h"

namespace attend::conformance {
namespace {

class FlashAttnVarlenInt8Case final : public Case {
 public:
  explicit FlashAttnVarlenInt8Case(Rng& rng)
      : problem_(rng, random_shape(rng), random_int8_options(rng)),
        expected_(oracle::flash_attn_varlen_int8(problem_.args())) {}

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    problem_.reset();
    flash_attn_varlen_int8(problem_.args(), &executor, kernels.isa);
    Outcome outcome;
    compare_written(outcome, "out", problem_.out, expected_.out, expected_.out_bound);
    if (problem_.options.lse) {
      compare_written(outcome, "lse", problem_.lse, expected_.lse, expected_.lse_bound);
    }
    return outcome;
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  Int8Problem problem_;
  oracle::Result expected_;
};

}  // namespace

Op op_flash_attn_varlen_int8() {
  return {"flash_attn_varlen_int8", true,
          [](Rng& rng) { return std::make_unique<FlashAttnVarlenInt8Case>(rng); }};
}

}  // namespace attend::conformance
