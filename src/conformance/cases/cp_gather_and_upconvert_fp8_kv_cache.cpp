// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/fp8_ds_v4.h"
#include "attend/ops/mla_cache.h"
#include "conformance/check.h"
#include "conformance/mla_rows.h"

namespace attend::conformance {
namespace {

MlaRows coded_rows(Rng& rng) {
  MlaRows rows(rng);
  rows.use(rng.chance(0.5) ? fp8_ds_mla::kFormat : fp8_ds_v4::kFormat);
  return rows;
}

class CpGatherAndUpconvertFp8KvCacheCase final : public Case {
 public:
  explicit CpGatherAndUpconvertFp8KvCacheCase(Rng& rng)
      : problem_(rng, coded_rows(rng), true),
        // Rows of others before the first request; without requests the rest is nobody's too.
        before_(rng.chance(0.3) ? rng.range(1, 9) : 0) {
    Layout layout;
    layout.padded = rng.chance(0.5);
    dst_ = Storage(rng, DType::bf16, {before_ + problem_.num_rows(), problem_.rows.dim()}, layout);
    dst_.freeze();
    std::vector<std::int32_t> starts(problem_.cu_seq_lens.begin(), problem_.cu_seq_lens.end() - 1);
    for (std::int32_t& start : starts) start += static_cast<std::int32_t>(before_);
    starts_ = int_storage(rng, starts);
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    dst_.reset();
    cp_gather_and_upconvert_fp8_kv_cache(
        {problem_.cache_view(), dst_.view(), problem_.blocks.table.view(), starts_.view()},
        &executor);
    problem_.for_each_row([&](std::int64_t row, const CacheRow& from) {
      expect_decoded_row(dst_, dst_.offset({before_ + row, 0}), problem_, from);
    });
    Outcome outcome;
    expect_undamaged(outcome, "dst", dst_);
    return outcome;
  }

  std::string describe() const override { return problem_.describe(); }

 private:
  MlaRead problem_;
  int before_;
  Storage dst_, starts_;
};

}  // namespace

Op op_cp_gather_and_upconvert_fp8_kv_cache() {
  return {"cp_gather_and_upconvert_fp8_kv_cache", false,
          [](Rng& rng) { return std::make_unique<CpGatherAndUpconvertFp8KvCacheCase>(rng); }};
}

}  // namespace attend::conformance
