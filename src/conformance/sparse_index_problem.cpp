// SPDX-License-Identifier: Apache-2.0
#include "conformance/sparse_index_problem.h"

#include <fmt/format.h>

#include <limits>

#include "attend/oracle/sparse_index.h"

namespace attend::conformance {

SparseIndexProblem::SparseIndexProblem(Rng& rng, int world_size)
    : block_size(rng.pick({1, 3, 16, 64})),
      tokens(rng.range(0, 40)),
      topk(rng.pick({1, 7, 64, 300})),
      num_blocks(rng.range(0, 30)),
      stride(rng.chance(0.3) ? block_size + rng.range(1, 9) : 0),
      wants_counts(rng.chance(0.6)) {
  Layout layout;
  layout.padded = rng.chance(0.5);
  const std::int64_t requests = rng.range(0, 5), width = rng.range(0, 12);
  const auto fill = [&rng](Storage& s, std::int64_t last, double bad) {
    for (const std::int64_t offset : s.offsets())
      s.view().as<std::int32_t>()[offset] = static_cast<std::int32_t>(
          rng.chance(bad) ? hostile(rng) : rng.range(std::int64_t{0}, last));
  };
  table = Storage(rng, DType::i32, {requests, width}, layout);
  fill(table, num_blocks, 0.05);
  req_id = Storage(rng, DType::i32, {tokens});
  fill(req_id, requests, 0.05);
  token_indices = Storage(rng, DType::i32, {tokens, topk}, layout);
  fill(token_indices, width * block_size * world_size, 0.01);
  out = Storage(rng, DType::i32, {tokens, topk}, layout);
  counts = Storage(rng, DType::i32, {tokens});
  out.freeze();
  counts.freeze();
}

std::int64_t SparseIndexProblem::hostile(Rng& rng) {
  constexpr std::int64_t kMin = std::numeric_limits<std::int32_t>::min();
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  return rng.pick({std::int64_t{-1}, std::int64_t{-64}, kMin, kMin + 1, kMax, kMax - 63,
                   std::int64_t{1} << 24});
}

std::int64_t SparseIndexProblem::paged_row(std::int64_t t, std::int64_t token, int rank,
                                           int world_size, int interleave) const {
  const std::int64_t request = req_id.view().as<std::int32_t>()[t];
  if (request < 0 || request >= table.view().shape[0]) return -1;
  const auto width = static_cast<std::size_t>(table.view().shape[1]);
  const std::int32_t* blocks = table.view().as<std::int32_t>() + request * table.view().strides[0];
  return oracle::global_index(token, {.blocks = {blocks, width},
                                      .num_blocks = num_blocks,
                                      .block_size = block_size,
                                      .stride = stride == 0 ? block_size : stride,
                                      .world_size = world_size,
                                      .interleave = interleave,
                                      .rank = rank});
}

void SparseIndexProblem::reset() {
  out.reset();
  counts.reset();
}

void SparseIndexProblem::expect_rows(std::int64_t t, const std::vector<std::int64_t>& rows,
                                     std::size_t valid) {
  for (std::int64_t j = 0; j < topk; ++j)
    out.expect_bits(out.offset({t, j}),
                    static_cast<std::uint64_t>(rows[static_cast<std::size_t>(j)]));
  if (wants_counts) counts.expect_bits(t, valid);
}

Outcome SparseIndexProblem::outcome() const {
  Outcome outcome;
  expect_undamaged(outcome, "out", out);
  expect_undamaged(outcome, "valid_counts", counts);
  return outcome;
}

std::string SparseIndexProblem::describe() const {
  return fmt::format("{} x {} indices, {} blocks of {} tokens, stride {}", tokens, topk, num_blocks,
                     block_size, stride);
}

}  // namespace attend::conformance
