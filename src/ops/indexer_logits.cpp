// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/indexer_logits.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "ops/indexer_run.h"
#include "ops/isa_choice.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "fp8_mqa_logits";

/// Rows that share packed keys: packing is then less than 2 % of the work.
constexpr std::int64_t kGroupRows = 64;

void check_tensors(const Fp8MqaLogitsArgs& a) {
  const check::Where keys{kOp, "k"}, scales{kOp, "k_scale"}, result{kOp, "logits"};
  check::tensor({kOp, "q"}, a.q, 3, {DType::fp8_e4m3});
  check::shape({kOp, "q"}, a.q, {-1, -1, cpu::kIndexerDim});
  check::unit_last_stride({kOp, "q"}, a.q);
  check::tensor(keys, a.k, 2, {DType::fp8_e4m3});
  check::shape(keys, a.k, {-1, cpu::kIndexerDim});
  check::unit_last_stride(keys, a.k);
  check::require(a.k.shape[0] <= std::numeric_limits<std::int32_t>::max(), keys,
                 "fewer than 2^31 keys", [&] { return describe(a.k); });
  check::tensor(scales, a.k_scale, 1, {DType::f32});
  check::shape(scales, a.k_scale, {a.k.shape[0]});
  check::contiguous(scales, a.k_scale);
  ops::check_indexer_rows(kOp, a.q, a.weights, a.logits);
  check::shape(result, a.logits, {-1, a.k.shape[0]});
  check::no_overlap(result, a.logits, "k", a.k);
  check::no_overlap(result, a.logits, "k_scale", a.k_scale);
  check::no_overlap(result, a.logits, "ks", a.ks);
  check::no_overlap(result, a.logits, "ke", a.ke);
}

}  // namespace

void fp8_mqa_logits(const Fp8MqaLogitsArgs& a, Executor* executor, std::optional<IsaLevel> isa) {
  check_tensors(a);
  const std::int64_t rows = a.q.shape[0], keys = a.k.shape[0];
  const auto starts = check::i32_array({kOp, "ks"}, a.ks, rows);
  const auto ends = check::i32_array({kOp, "ke"}, a.ke, rows);
  for (std::size_t i = 0; i < starts.size(); ++i) {
    check::require(starts[i] >= 0 && starts[i] <= ends[i], {kOp, "ks"},
                   "starts from 0 to the row's end",
                   [&] { return fmt::format("{} to {} at index {}", starts[i], ends[i], i); });
    check::require(
        ends[i] <= keys, {kOp, "ke"}, [&] { return fmt::format("ends up to {}, the keys", keys); },
        [&] { return fmt::format("{} at index {}", ends[i], i); });
  }
  const cpu::IndexerKernel& kernel = cpu::indexer_kernel(ops::checked_level(kOp, isa));

  const auto span = [&](std::int64_t row) {
    const auto at = static_cast<std::size_t>(row);
    return ops::KeySpan{starts[at], ends[at]};
  };
  const auto find = [&](std::int64_t, const ops::IndexerKeyRange& range) {
    for (int i = 0; i < range.count; ++i)
      range.rows[i] = a.k.as<std::uint8_t>() + (range.begin + i) * a.k.strides[0];
    std::copy_n(a.k_scale.as<float>() + range.begin, range.count, range.scales);
  };
  ConstTensorView q(a.q.data, a.q.dtype, {rows, 1, a.q.shape[1], a.q.shape[2]});
  q.strides[0] = a.q.strides[0];
  q.strides[2] = a.q.strides[1];
  ops::run_indexer_logits({.q = q,
                           .weights = a.weights,
                           .logits = a.logits,
                           .clean_logits = a.clean_logits,
                           .group_rows = kGroupRows,
                           .span = span,
                           .find = find},
                          kernel, executor);
}

}  // namespace attend
