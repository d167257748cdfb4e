// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/mla_cache.h"
#include "conformance/check.h"
#include "conformance/mla_rows.h"

namespace attend::conformance {
namespace {

class ConcatAndCacheMlaCase final : public Case {
 public:
  explicit ConcatAndCacheMlaCase(Rng& rng) : problem_(rng) {}

  Outcome run(const KernelOptions&, Executor& executor) override {
    MlaWrite& p = problem_;
    p.cache.reset();
    ConcatAndCacheMlaArgs args{p.kv_c.view(), p.k_pe.view(), p.cache_view(), p.slot_view()};
    if (is_fp8(p.rows.stored)) args.scale = p.scale.view();
    concat_and_cache_mla(args, &executor);
    p.expect_rows(p.k_pe);
    Outcome outcome;
    expect_undamaged(outcome, "kv_cache", p.cache);
    return outcome;
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  MlaWrite problem_;
};

}  // namespace

Op op_concat_and_cache_mla() {
  return {"concat_and_cache_mla", false,
          [](Rng& rng) { return std::make_unique<ConcatAndCacheMlaCase>(rng); }};
}

}  // namespace attend::conformance
