// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "attend/ops/attention.h"
#include "attend/oracle/attention.h"
#include "conformance/check.h"
#include "conformance/kvcache_problem.h"

namespace attend::conformance {
namespace {

class FlashAttnWithKvCacheCase final : public Case {
 public:
  explicit FlashAttnWithKvCacheCase(Rng& rng)
      : problem_(rng), expected_(oracle::flash_attn_with_kvcache(problem_.args())) {
    if (problem_.options.append) appended_ = oracle::appended_keys(problem_.args());
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    problem_.reset();
    flash_attn_with_kvcache(problem_.args(), &executor, kernels);
    Outcome outcome;
    compare_written(outcome, "out", problem_.out, expected_.out, expected_.out_bound);
    if (problem_.options.lse) {
      compare_written(outcome, "lse", problem_.lse, expected_.lse, expected_.lse_bound);
    }
    compare_appended(outcome);
    expect_undamaged(outcome, "k_cache", problem_.k_cache);
    expect_undamaged(outcome, "v_cache", problem_.v_cache);
    return outcome;
  }

  std::optional<KernelKind> kind() const override {
    const DType dtype = problem_.shape.dtype;
    return kernel_kind(dtype, dtype, dtype);
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  void compare_appended(Outcome& outcome) {
    KvCacheProblem& p = problem_;
    std::size_t next = 0;
    for (int r = 0; r < p.shape.num_reqs(); ++r) {
      for (int i = 0; i < p.num_appended; ++i) {
        const std::int64_t row = p.cached[static_cast<std::size_t>(r)] + i;
        for (int h = 0; h < p.shape.kv_heads; ++h) {
          const std::int64_t key = p.cache_offset(p.k_cache, r, row, h);
          for (int d = 0; d < p.shape.head_dim; ++d, ++next) {
            compare(
                outcome, p.k_cache.get(key + d), appended_.value[next], appended_.bound[next],
                [&] { return fmt::format("k_cache row {} of request {} [{}, {}]", row, r, h, d); });
            p.k_cache.accept(key + d);
          }
          const std::int64_t value = p.cache_offset(p.v_cache, r, row, h);
          const std::int64_t source = p.v_new.offset({r, i, h, 0});
          for (int d = 0; d < p.shape.head_dim_v; ++d) {
            p.v_cache.expect_copy(value + d, p.v_new, source + d);
          }
        }
      }
    }
  }

  KvCacheProblem problem_;
  oracle::Result expected_;
  oracle::AppendedKeys appended_;
};

}  // namespace

Op op_flash_attn_with_kvcache() {
  return {"flash_attn_with_kvcache", true,
          [](Rng& rng) { return std::make_unique<FlashAttnWithKvCacheCase>(rng); }, true};
}

}  // namespace attend::conformance
