// SPDX-License-Identifier: Apache-2.0
#include "conformance/check.h"
#include "conformance/flash_mla_problem.h"

namespace attend::conformance {
namespace {

/// [blocks, rows, E] with the dimension of the one head.
ConstTensorView with_head(const ConstTensorView& cache) {
  ConstTensorView view(cache.data, cache.dtype,
                       {cache.shape[0], cache.shape[1], 1, cache.shape[2]});
  view.strides = {cache.strides[0], cache.strides[1], cache.strides[2], cache.strides[2]};
  return view;
}

class SparseFlashMlaWithKvCacheCase final : public Case {
 public:
  explicit SparseFlashMlaWithKvCacheCase(Rng& rng) : p_(rng, true) {}

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    p_.out.reset();
    p_.lse.reset();
    FlashMlaWithKvCacheArgs a;
    a.q = p_.q.view();
    a.k_cache = with_head(p_.keys.cache_view());
    a.indices = p_.keys.indices.view();
    a.topk_length = p_.keys.lengths.view();
    a.head_dim_v = p_.latent;
    a.softmax_scale = p_.scale;
    a.is_fp8_kvcache = p_.format != nullptr;
    a.attn_sink = p_.sink.view();
    if (p_.extra) {
      a.extra_k_cache = with_head(p_.extra->cache_view());
      a.extra_indices = p_.extra->indices.view();
      a.extra_topk_length = p_.extra->lengths.view();
    }
    a.out = p_.out.view();
    a.lse = p_.lse.view();
    flash_mla_with_kvcache(a, &executor, kernels);
    Outcome outcome;
    p_.compare(outcome, false);
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    const DType stored = p_.format != nullptr ? DType::u8 : p_.dtype;
    return kernel_kind(p_.dtype, stored, stored);
  }
  std::string describe() const override { return p_.describe(); }

 private:
  FlashMlaProblem p_;
};

}  // namespace

Op op_sparse_flash_mla_with_kvcache() {
  return {"sparse_flash_mla_with_kvcache", true,
          [](Rng& rng) { return std::make_unique<SparseFlashMlaWithKvCacheCase>(rng); }, true};
}

}  // namespace attend::conformance
