// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"
#include "conformance/mla_weights_problem.h"

namespace attend::conformance {
namespace {

class AbsorbQueryCase final : public Case {
 public:
  explicit AbsorbQueryCase(Rng& rng)
      : problem_(rng),
        q_nope_(problem_.activations(rng, problem_.dims().qk_nope_head_dim, true)),
        ql_nope_(problem_.output(rng, problem_.dims().kv_lora_rank)),
        expected_(oracle::absorb_query(problem_.expected(), q_nope_.view())) {
    q_nope_.freeze();
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    ql_nope_.reset();
    q_nope_.reset();
    problem_.weights(*kernels.isa, executor)
        ->absorb_query(q_nope_.view(), ql_nope_.view(), &executor);
    Outcome outcome;
    compare_written(outcome, "ql_nope", ql_nope_, expected_.out, expected_.bound);
    expect_undamaged(outcome, "q_nope", q_nope_);
    return outcome;
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  MlaWeightsProblem problem_;
  Storage q_nope_, ql_nope_;
  oracle::Projection expected_;
};

}  // namespace

Op op_mla_absorb_query() {
  return {"mla_absorb_query", true,
          [](Rng& rng) { return std::make_unique<AbsorbQueryCase>(rng); }};
}

}  // namespace attend::conformance
