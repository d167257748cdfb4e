// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"
#include "conformance/mla_weights_problem.h"

namespace attend::conformance {
namespace {

class VUpProjectCase final : public Case {
 public:
  explicit VUpProjectCase(Rng& rng)
      : problem_(rng),
        latents_(problem_.activations(rng, problem_.dims().kv_lora_rank, true)),
        out_(problem_.output(rng, problem_.dims().v_head_dim)),
        expected_(oracle::v_up_project(problem_.expected(), latents_.view())) {
    latents_.freeze();
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    out_.reset();
    latents_.reset();
    problem_.weights(*kernels.isa, executor)->v_up_project(latents_.view(), out_.view(), &executor);
    Outcome outcome;
    compare_written(outcome, "out", out_, expected_.out, expected_.bound);
    expect_undamaged(outcome, "latents", latents_);
    return outcome;
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  MlaWeightsProblem problem_;
  Storage latents_, out_;
  oracle::Projection expected_;
};

}  // namespace

Op op_mla_v_up_project() {
  return {"mla_v_up_project", true, [](Rng& rng) { return std::make_unique<VUpProjectCase>(rng); }};
}

}  // namespace attend::conformance
