// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/top_k.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "ops/mla_rows.h"
#include "ops/top_k_row.h"

namespace attend {
namespace {

// Checks what both ops have.
void require_rows(std::string_view op, const ConstTensorView& logits, const TensorView& out) {
  const check::Where in{op, "logits"}, result{op, "out"};
  check::tensor(in, logits, 2, {DType::f32});
  check::unit_last_stride(in, logits);
  check::require(logits.shape[1] <= std::numeric_limits<std::int32_t>::max(), in,
                 "fewer than 2^31 logits a row", [&] { return describe(logits); });
  check::tensor(result, out, 2, {DType::i32});
  check::shape(result, out, {logits.shape[0], -1});
  check::require(out.shape[1] >= 1, result, "k of at least 1", [&] { return describe(out); });
  check::unit_last_stride(result, out);
  check::distinct_elements(result, out);
  check::no_overlap(result, out, "logits", logits);
}

// range_of(row) gives the logits of a row, [first, second). Rows go to the workers in turn, since
// the lengths of neighbours are alike.
template <typename RangeOf>
void select_rows(const ConstTensorView& logits, const TensorView& out, Executor* executor,
                 RangeOf&& range_of) {
  const std::int64_t rows = logits.shape[0], k = out.shape[1];
  const bool small = rows == 1 || rows * std::max(logits.shape[1], k) < mla_rows::kParallelElements;
  mla_rows::run(small, executor, [&](int worker, int workers) {
    for (std::int64_t t = worker; t < rows; t += workers) {
      const auto [begin, end] = range_of(t);
      top_k::select_row(logits.as<float>() + t * logits.strides[0] + begin, end - begin, k,
                        out.as<std::int32_t>() + t * out.strides[0]);
    }
  });
}

using Range = std::pair<std::int64_t, std::int64_t>;

}  // namespace

void top_k_per_row_prefill(const TopKPerRowPrefillArgs& a, Executor* executor) {
  constexpr std::string_view kOp = "top_k_per_row_prefill";
  require_rows(kOp, a.logits, a.out);
  const std::int64_t rows = a.logits.shape[0], width = a.logits.shape[1];
  const auto starts = check::i32_array({kOp, "row_starts"}, a.row_starts, rows);
  const auto ends = check::i32_array({kOp, "row_ends"}, a.row_ends, rows);
  for (std::size_t t = 0; t < starts.size(); ++t) {
    check::require(starts[t] >= 0 && starts[t] <= ends[t], {kOp, "row_starts"},
                   "starts from 0 to the row's end",
                   [&] { return fmt::format("{} to {} at index {}", starts[t], ends[t], t); });
    check::require(
        ends[t] <= width, {kOp, "row_ends"}, [&] { return fmt::format("ends up to {}", width); },
        [&] { return fmt::format("{} at index {}", ends[t], t); });
  }
  check::no_overlap({kOp, "out"}, a.out, "row_starts", a.row_starts);
  check::no_overlap({kOp, "out"}, a.out, "row_ends", a.row_ends);
  select_rows(a.logits, a.out, executor, [&](std::int64_t t) {
    const auto at = static_cast<std::size_t>(t);
    return Range{starts[at], ends[at]};
  });
}

void top_k_per_row_decode(const TopKPerRowDecodeArgs& a, Executor* executor) {
  constexpr std::string_view kOp = "top_k_per_row_decode";
  require_rows(kOp, a.logits, a.out);
  const std::int64_t rows = a.logits.shape[0], width = a.logits.shape[1];
  check::require(
      a.next_n >= 1 && rows % a.next_n == 0, {kOp, "next_n"},
      [&] { return fmt::format("at least 1 and a divisor of {} rows", rows); }, a.next_n);
  const auto lens = check::i32_array({kOp, "seq_lens"}, a.seq_lens, rows / a.next_n);
  for (std::size_t b = 0; b < lens.size(); ++b) {
    check::require(
        lens[b] >= 0 && lens[b] <= width, {kOp, "seq_lens"},
        [&] { return fmt::format("lengths in [0, {}]", width); },
        [&] { return fmt::format("{} at index {}", lens[b], b); });
  }
  check::no_overlap({kOp, "out"}, a.out, "seq_lens", a.seq_lens);
  select_rows(a.logits, a.out, executor, [&](std::int64_t t) {
    const std::int64_t length =
        std::int64_t{lens[static_cast<std::size_t>(t / a.next_n)]} - a.next_n + t % a.next_n + 1;
    return Range{0, std::max<std::int64_t>(length, 0)};
  });
}

}  // namespace attend
