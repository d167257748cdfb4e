// SPDX-License-Identifier: Apache-2.0
#include "ops/indexer_run.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>

#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/mla_rows.h"

namespace attend::ops {
namespace {

using cpu::IndexerKernel;

constexpr std::int64_t kPanel = cpu::kIndexerPanel;
/// Enough for workers to end at about the same time.
constexpr std::int64_t kUnitsPerWorker = 8;
/// Packing pays from so many keys on.
constexpr std::int64_t kFewestKeys = 128;
/// Products that one worker computes in about the time that waking the others takes.
constexpr double kParallelProducts = 1e6;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

/// Fills packed keys up.
constexpr std::array<std::uint8_t, cpu::kIndexerDim> kNoKey{};

constexpr std::int64_t round_up(std::int64_t n, std::int64_t step) noexcept {
  return (n + step - 1) / step * step;
}

/// Memory of one worker.
class Scratch {
 public:
  static std::int64_t bytes(const IndexerKernel& kernel, std::int64_t heads) noexcept {
    return kernel.most_keys() * (kernel.key_bytes + kPerKey) +
           round_up(kernel.scratch_bytes(heads), 64);
  }
  Scratch(const IndexerKernel& kernel, std::byte* memory) noexcept
      : packed(memory),
        rows(
            reinterpret_cast<const std::uint8_t**>(memory + kernel.most_keys() * kernel.key_bytes)),
        scales(reinterpret_cast<float*>(rows + kernel.most_keys())),
        row(scales + kernel.most_keys()) {}

  void* packed;
  const std::uint8_t** rows;
  float* scales;
  void* row;

 private:
  static constexpr std::int64_t kPerKey = sizeof(void*) + sizeof(float);
};

/// Work in units: a group of rows, and a piece of the columns.
class Units {
 public:
  Units(const IndexerLogitsWork& work, const IndexerKernel& kernel, int workers)
      : w_(work),
        kernel_(kernel),
        rows_(w_.logits.shape[0]),
        width_(w_.logits.shape[1]),
        piece_(kernel.most_keys()) {
    groups_ = (rows_ + w_.group_rows - 1) / w_.group_rows;
    while (piece_ > kFewestKeys && count() < kUnitsPerWorker * workers) piece_ /= 2;
  }
  std::int64_t count() const noexcept { return groups_ * ((width_ + piece_ - 1) / piece_); }

  void run(std::int64_t unit, const Scratch& scratch) const noexcept {
    const std::int64_t group = unit % groups_;
    const KeySpan piece{unit / groups_ * piece_, std::min((unit / groups_ + 1) * piece_, width_)};
    const std::int64_t first = group * w_.group_rows;
    const std::int64_t last = std::min(first + w_.group_rows, rows_);
    KeySpan all{piece.end, piece.begin};
    for (std::int64_t row = first; row < last; ++row) {
      const KeySpan seen = seen_in(piece, row);
      if (seen.begin == seen.end) continue;
      all = {std::min(all.begin, seen.begin), std::max(all.end, seen.end)};
    }
    if (all.begin < all.end) pack(group, all, scratch);
    for (std::int64_t row = first; row < last; ++row) run_row(row, piece, all.begin, scratch);
  }

 private:
  KeySpan seen_in(const KeySpan& piece, std::int64_t row) const noexcept {
    const KeySpan span = w_.span(row);
    const std::int64_t begin = std::clamp(span.begin, piece.begin, piece.end);
    return {begin, std::clamp(span.end, begin, piece.end)};
  }

  void pack(std::int64_t group, const KeySpan& keys, const Scratch& scratch) const noexcept {
    const auto count = static_cast<int>(keys.end - keys.begin);
    w_.find(group, {keys.begin, count, scratch.rows, scratch.scales});
    std::fill(scratch.rows + count, scratch.rows + round_up(count, kPanel), kNoKey.data());
    kernel_.pack({scratch.rows, count, scratch.packed});
  }

  void run_row(std::int64_t row, const KeySpan& piece, std::int64_t first_packed,
               const Scratch& scratch) const noexcept {
    const KeySpan seen = seen_in(piece, row);
    float* logits = w_.logits.as<float>() + row * w_.logits.strides[0];
    if (w_.clean_logits) {
      std::fill(logits + piece.begin, logits + seen.begin, kNothing);
      std::fill(logits + seen.end, logits + piece.end, kNothing);
    }
    if (seen.begin == seen.end) return;
    cpu::IndexerRow r;
    r.q = w_.q.as<std::uint8_t>() + row / w_.q.shape[1] * w_.q.strides[0] +
          row % w_.q.shape[1] * w_.q.strides[1];
    r.q_head = w_.q.strides[2];
    r.weights = w_.weights.as<float>() + row * w_.weights.strides[0];
    r.heads = static_cast<int>(w_.q.shape[2]);
    r.packed = scratch.packed;
    r.scales = scratch.scales;
    r.begin = static_cast<int>(seen.begin - first_packed);
    r.end = static_cast<int>(seen.end - first_packed);
    r.logits = logits + first_packed;
    r.scratch = scratch.row;
    kernel_.logits(r);
  }

  const IndexerLogitsWork& w_;
  const IndexerKernel& kernel_;
  std::int64_t rows_, width_, groups_ = 0, piece_;
};

}  // namespace

void run_indexer_logits(const IndexerLogitsWork& work, const IndexerKernel& kernel,
                        Executor* executor) {
  const std::int64_t heads = work.q.shape[2];
  const double products =
      static_cast<double>(work.logits.numel()) * static_cast<double>(heads) * cpu::kIndexerDim;
  const bool small = products < kParallelProducts;
  if (work.logits.numel() == 0) return;
  if (!small && executor == nullptr) executor = &default_executor();
  const int workers = small ? 1 : executor->num_workers();
  const Units units(work, kernel, workers);
  const std::int64_t bytes = Scratch::bytes(kernel, heads);
  const Workspace memory = thread_workspace(static_cast<std::size_t>(bytes * workers));
  std::atomic<std::int64_t> next{0};
  mla_rows::run(small, executor, [&](int worker, int) {
    const Scratch scratch(kernel, static_cast<std::byte*>(memory.data) + bytes * worker);
    for (std::int64_t i = next++; i < units.count(); i = next++) units.run(i, scratch);
  });
}

void check_indexer_rows(std::string_view op, const ConstTensorView& q,
                        const ConstTensorView& weights, const TensorView& logits) {
  const check::Where result{op, "logits"};
  check::require(q.shape[q.rank - 2] >= 1 && q.shape[q.rank - 2] <= (1 << 20), {op, "q"},
                 "from 1 to 2^20 heads", [&] { return describe(q); });
  std::int64_t rows = 1;
  for (int dim = 0; dim < q.rank - 2; ++dim) rows *= q.shape[dim];
  check::tensor({op, "weights"}, weights, 2, {DType::f32});
  check::shape({op, "weights"}, weights, {rows, q.shape[q.rank - 2]});
  check::unit_last_stride({op, "weights"}, weights);
  check::tensor(result, logits, 2, {DType::f32});
  check::shape(result, logits, {rows, -1});
  check::unit_last_stride(result, logits);
  check::distinct_elements(result, logits);
  check::no_overlap(result, logits, "q", q);
  check::no_overlap(result, logits, "weights", weights);
}

}  // namespace attend::ops
