// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"
#include "conformance/flash_mla_problem.h"

namespace attend::conformance {
namespace {

class SparseFlashMlaFwdCase final : public Case {
 public:
  explicit SparseFlashMlaFwdCase(Rng& rng) : p_(rng, false) {}

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    for (Storage* s : {&p_.out, &p_.lse, &p_.max_logits}) s->reset();
    FlashMlaSparseFwdArgs a;
    a.q = p_.q.view().select(1, 0);
    a.kv = p_.keys.cache_view();
    a.indices = p_.keys.indices.view();
    a.topk_length = p_.keys.lengths.view();
    a.sm_scale = p_.scale;
    a.d_v = p_.latent;
    a.attn_sink = p_.sink.view();
    a.out = p_.out.view().select(1, 0);
    a.lse = p_.lse.view();
    a.max_logits = p_.max_logits.view();
    flash_mla_sparse_fwd(a, &executor, kernels);
    Outcome outcome;
    p_.compare(outcome, true);
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    return kernel_kind(p_.dtype, p_.dtype, p_.dtype);
  }
  std::string describe() const override { return p_.describe(); }

 private:
  FlashMlaProblem p_;
};

}  // namespace

Op op_sparse_flash_mla_fwd() {
  return {"sparse_flash_mla_fwd", true,
          [](Rng& rng) { return std::make_unique<SparseFlashMlaFwdCase>(rng); }, true};
}

}  // namespace attend::conformance
