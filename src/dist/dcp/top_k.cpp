// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <iterator>
#include <limits>
#include <vector>

#include "attend/core/workspace.h"
#include "attend/dist/indexer.h"
#include "core/check.h"
#include "dist/dcp/layout.h"
#include "dist/dcp/reserve.h"
#include "ops/mla_rows.h"
#include "ops/top_k_row.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "dcp_top_k";

/// Memory of one call; a thread reuses it.
struct Scratch {
  Buffer send, recv;
};
Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

/// A chosen token as it is sent; position -1 = none.
struct Chosen {
  std::int32_t position = -1, logit_bits = 0;
};
static_assert(sizeof(Chosen) == 2 * sizeof(std::int32_t));

/// First columns of the rows, empty = all 0.
using Starts = std::span<const std::int32_t>;

Starts check_args(const DcpTopKArgs& a, const DcpLayout& layout) {
  dcp::check_layout(kOp, layout);
  const check::Where logits{kOp, "logits"}, indices{kOp, "indices"}, result{kOp, "out"};
  check::tensor(logits, a.logits, 2, {DType::f32});
  check::unit_last_stride(logits, a.logits);
  check::tensor(indices, a.indices, 2, {DType::i32});
  check::shape(indices, a.indices, {a.logits.shape[0], -1});
  check::unit_last_stride(indices, a.indices);
  check::require(a.indices.shape[1] >= 1, indices, "k of at least 1",
                 [&] { return describe(a.indices); });
  check::tensor(result, a.out, 2, {DType::i32});
  check::shape(result, a.out, {a.logits.shape[0], a.indices.shape[1]});
  check::unit_last_stride(result, a.out);
  check::distinct_elements(result, a.out);
  check::no_overlap(result, a.out, "logits", a.logits);
  check::no_overlap(result, a.out, "indices", a.indices);
  if (!a.row_starts.defined()) return {};
  check::no_overlap(result, a.out, "row_starts", a.row_starts);
  const Starts starts = check::i32_array({kOp, "row_starts"}, a.row_starts, a.logits.shape[0]);
  for (std::size_t t = 0; t < starts.size(); ++t) {
    check::require(
        starts[t] >= 0 && starts[t] <= a.logits.shape[1], {kOp, "row_starts"},
        [&] { return fmt::format("columns in [0, {}]", a.logits.shape[1]); },
        [&] { return fmt::format("{} at index {}", starts[t], t); });
  }
  return starts;
}

std::int64_t position_of(std::int64_t index, int rank, const DcpLayout& layout) noexcept {
  const std::int64_t i = layout.interleave;
  return index / i * dcp::period(layout) + rank * i + index % i;
}

/// Each row ascends and ends with -1, and leads to logits and to positions of i32.
void check_indices(const DcpTopKArgs& a, Starts starts, int rank, const DcpLayout& layout) {
  const check::Where where{kOp, "indices"};
  for (std::int64_t t = 0; t < a.indices.shape[0]; ++t) {
    const auto* row = a.indices.as<std::int32_t>() + t * a.indices.strides[0];
    const std::int64_t width =
        a.logits.shape[1] - (starts.empty() ? 0 : starts[static_cast<std::size_t>(t)]);
    std::int64_t before = -1;
    for (std::int64_t j = 0; j < a.indices.shape[1]; ++j) {
      const std::int64_t index = row[j];
      const bool ends = index == -1, ascends = index > before && before != width;
      check::require(
          ends || (ascends && index < width), where,
          [&] { return fmt::format("indices that ascend within [0, {}), then -1", width); },
          [&] { return fmt::format("{} at [{}, {}]", index, t, j); });
      before = ends ? width : index;  // nothing comes after -1
      check::require(
          ends || position_of(index, rank, layout) <= std::numeric_limits<std::int32_t>::max(),
          where, "indices of positions below 2^31",
          [&] { return fmt::format("{} at [{}, {}]", index, t, j); });
    }
  }
}

/// This rank's choice.
void pack_rows(const DcpTopKArgs& a, Starts starts, const DcpLayout& layout, int rank, Chosen* to) {
  const std::int64_t k = a.indices.shape[1];
  for (std::int64_t t = 0; t < a.indices.shape[0]; ++t) {
    const auto* row = a.indices.as<std::int32_t>() + t * a.indices.strides[0];
    const float* logits = a.logits.as<float>() + t * a.logits.strides[0] +
                          (starts.empty() ? 0 : starts[static_cast<std::size_t>(t)]);
    for (std::int64_t j = 0; j < k; ++j) {
      Chosen& c = to[t * k + j];
      c = {};
      if (row[j] < 0) continue;
      c.position = static_cast<std::int32_t>(position_of(row[j], rank, layout));
      c.logit_bits = std::bit_cast<std::int32_t>(logits[row[j]]);
    }
  }
}

/// Chooses row t out of what all ranks chose.
class RowMerge {
 public:
  RowMerge(const Chosen* all, int ranks, std::int64_t rows, std::int64_t k)
      : all_(all), ranks_(ranks), rows_(rows), k_(k), picked_(static_cast<std::size_t>(k)) {
    candidates_.reserve(static_cast<std::size_t>(ranks * k));
    merged_.reserve(candidates_.capacity());
    logits_.reserve(candidates_.capacity());
  }
  void run(std::int64_t t, std::int32_t* out) {
    candidates_.clear();
    logits_.clear();
    for (int r = 0; r < ranks_; ++r) {
      const Chosen* row = all_ + (r * rows_ + t) * k_;
      const auto end = std::find_if(row, row + k_, [](const Chosen& c) { return c.position < 0; });
      merged_.clear();
      std::merge(candidates_.begin(), candidates_.end(), row, end, std::back_inserter(merged_),
                 [](const Chosen& a, const Chosen& b) { return a.position < b.position; });
      candidates_.swap(merged_);
    }
    for (const Chosen& c : candidates_) logits_.push_back(std::bit_cast<float>(c.logit_bits));
    // In order of position the lower index among equals is the lower position.
    top_k::select_row(logits_.data(), static_cast<std::int64_t>(logits_.size()), k_,
                      picked_.data());
    for (const std::int32_t i : picked_)
      *out++ = i < 0 ? -1 : candidates_[static_cast<std::size_t>(i)].position;
  }

 private:
  const Chosen* all_;
  int ranks_;
  std::int64_t rows_, k_;
  std::vector<Chosen> candidates_, merged_;
  std::vector<float> logits_;
  std::vector<std::int32_t> picked_;
};

}  // namespace

void dcp_top_k(const DcpTopKArgs& a, Communicator& comm, Executor* executor) {
  const DcpLayout layout{comm.size(), a.interleave};
  const Starts starts = check_args(a, layout);
  check_indices(a, starts, comm.rank(), layout);
  const std::int64_t rows = a.indices.shape[0], k = a.indices.shape[1];
  Scratch& scratch = thread_scratch();
  const TensorView send = dcp::reserve(scratch.send, DType::i32, {rows, k, 2});
  const TensorView recv = dcp::reserve(scratch.recv, DType::i32, {comm.size(), rows, k, 2});
  pack_rows(a, starts, layout, comm.rank(), send.as<Chosen>());
  comm.all_gather(send, recv);
  const bool small = rows * k * comm.size() < mla_rows::kParallelElements;
  mla_rows::run(small, executor, [&](int worker, int workers) {
    RowMerge merge(recv.as<Chosen>(), comm.size(), rows, k);
    for (std::int64_t t = rows * worker / workers; t < rows * (worker + 1) / workers; ++t)
      merge.run(t, a.out.as<std::int32_t>() + t * a.out.strides[0]);
  });
}

}  // namespace attend
