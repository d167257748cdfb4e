// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"
#include "conformance/mla_weights_problem.h"

namespace attend::conformance {
namespace {

class UpProjectCase final : public Case {
 public:
  explicit UpProjectCase(Rng& rng)
      : problem_(rng),
        kv_c_(problem_.activations(rng, problem_.dims().kv_lora_rank, false)),
        k_nope_(problem_.output(rng, problem_.dims().qk_nope_head_dim)),
        v_(problem_.output(rng, problem_.dims().v_head_dim)),
        keys_(oracle::up_project_keys(problem_.expected(), kv_c_.view())),
        values_(oracle::up_project_values(problem_.expected(), kv_c_.view())) {
    kv_c_.freeze();
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    k_nope_.reset();
    v_.reset();
    kv_c_.reset();
    problem_.weights(*kernels.isa, executor)
        ->up_project(kv_c_.view(), k_nope_.view(), v_.view(), &executor);
    Outcome outcome;
    compare_written(outcome, "k_nope", k_nope_, keys_.out, keys_.bound);
    compare_written(outcome, "v", v_, values_.out, values_.bound);
    expect_undamaged(outcome, "kv_c", kv_c_);
    return outcome;
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  MlaWeightsProblem problem_;
  Storage kv_c_, k_nope_, v_;
  oracle::Projection keys_, values_;
};

}  // namespace

Op op_mla_up_project() {
  return {"mla_up_project", true, [](Rng& rng) { return std::make_unique<UpProjectCase>(rng); }};
}

}  // namespace attend::conformance
