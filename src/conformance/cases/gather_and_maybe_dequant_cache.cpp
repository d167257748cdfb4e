// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "attend/ops/mla_cache.h"
#include "attend/oracle/quantize.h"
#include "conformance/check.h"
#include "conformance/mla_rows.h"

namespace attend::conformance {
namespace {

class GatherAndMaybeDequantCacheCase final : public Case {
 public:
  explicit GatherAndMaybeDequantCacheCase(Rng& rng)
      : problem_(rng, MlaRows(rng), rng.chance(0.3)), seq_starts_given_(rng.chance(0.8)) {
    for (const std::int32_t start : problem_.starts) seq_starts_given_ |= start > 0;
    Layout layout;
    layout.padded = rng.chance(0.5);
    const MlaRows& rows = problem_.rows;
    const DType dtype =
        rows.is_coded() ? rng.pick({DType::f32, DType::f16, DType::bf16}) : rows.dtype;
    dst_ = Storage(rng, dtype, {problem_.num_rows() + rng.range(0, 5), rows.dim()}, layout);
    dst_.freeze();
    cu_seq_lens_ = int_storage(rng, problem_.cu_seq_lens);
    seq_starts_ = int_storage(rng, problem_.starts);
    if (!is_fp8(rows.stored)) return;
    scale_ = Storage(rng, DType::f32, {1});
    scale_.set(0, std::exp2(20.0 * rng.uniform() - 14.0));
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    dst_.reset();
    GatherAndMaybeDequantCacheArgs args;
    args.src_cache = problem_.cache_view();
    args.dst = dst_.view();
    args.block_table = problem_.blocks.table.view();
    args.cu_seq_lens = cu_seq_lens_.view();
    if (seq_starts_given_) args.seq_starts = seq_starts_.view();
    if (is_fp8(problem_.rows.stored)) args.scale = scale_.view();
    gather_and_maybe_dequant_cache(args, &executor);
    problem_.for_each_row(
        [&](std::int64_t row, const CacheRow& at) { expect_row(dst_.offset({row, 0}), at); });
    Outcome outcome;
    expect_undamaged(outcome, "dst", dst_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("{} into {}", problem_.describe(), to_string(dst_.view().dtype));
  }

 private:
  void expect_row(std::int64_t to, const CacheRow& at) {
    const MlaRows& rows = problem_.rows;
    if (rows.is_bytes()) return expect_decoded_row(dst_, to, problem_, at);
    const std::int64_t from = problem_.row_offset(at);
    for (std::int64_t i = 0; i < rows.dim(); ++i) {
      if (!rows.is_coded()) {
        dst_.expect_copy(to + i, problem_.cache, from + i);
        continue;
      }
      const double value = problem_.cache.get(from + i);
      const double product = static_cast<float>(value * scale_.get(0));
      dst_.expect_value(to + i,
                        std::isnan(value) ? std::numeric_limits<double>::quiet_NaN() : product);
    }
  }

  MlaRead problem_;
  bool seq_starts_given_;
  Storage dst_, cu_seq_lens_, seq_starts_, scale_;
};

}  // namespace

Op op_gather_and_maybe_dequant_cache() {
  return {"gather_and_maybe_dequant_cache", false,
          [](Rng& rng) { return std::make_unique<GatherAndMaybeDequantCacheCase>(rng); }};
}

}  // namespace attend::conformance
