// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/fp8_ds_mla.h"
#include "attend/ops/mla_cache.h"
#include "conformance/check.h"
#include "conformance/mla_rows.h"

namespace attend::conformance {
namespace {

// Rows that are one run of bytes each.
MlaRows whole_rows(Rng& rng) {
  MlaRows rows(rng);
  if (rows.is_bytes()) rows.use(fp8_ds_mla::kFormat);
  return rows;
}

class CpGatherCacheCase final : public Case {
 public:
  explicit CpGatherCacheCase(Rng& rng) : problem_(rng, whole_rows(rng), rng.chance(0.3)) {
    Layout layout;
    layout.padded = rng.chance(0.5);
    const MlaRows& rows = problem_.rows;
    dst_ = Storage(rng, rows.stored, {problem_.num_rows() + rng.range(0, 5), rows.stored_dim()},
                   layout);
    dst_.freeze();
    cu_seq_lens_ = int_storage(rng, problem_.cu_seq_lens);
    seq_starts_ = int_storage(rng, problem_.starts);
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    dst_.reset();
    cp_gather_cache({problem_.cache_view(), dst_.view(), problem_.blocks.table.view(),
                     cu_seq_lens_.view(), seq_starts_.view()},
                    &executor);
    problem_.for_each_row([&](std::int64_t row, const CacheRow& at) {
      const std::int64_t from = problem_.row_offset(at);
      const std::int64_t to = dst_.offset({row, 0});
      for (std::int64_t i = 0; i < problem_.rows.stored_dim(); ++i)
        dst_.expect_copy(to + i, problem_.cache, from + i);
    });
    Outcome outcome;
    expect_undamaged(outcome, "dst", dst_);
    return outcome;
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  MlaRead problem_;
  Storage dst_, cu_seq_lens_, seq_starts_;
};

}  // namespace

Op op_cp_gather_cache() {
  return {"cp_gather_cache", false,
          [](Rng& rng) { return std::make_unique<CpGatherCacheCase>(rng); }};
}

}  // namespace attend::conformance
