// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/slot_mapping.h"

#include <algorithm>

#include "core/check.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "make_slot_mapping";

void check_arguments(const CommonMetadata& m, int block_size, const SlotMappingOptions& options) {
  check::require(block_size >= 1, {kOp, "block_size"}, "a number >= 1", block_size);
  check::require(options.sliding_window.value_or(1) >= 1, {kOp, "sliding_window"},
                 "a number >= 1, or none", options.sliding_window.value_or(0));
  m.validate(block_size);
  check::require(
      options.padded_tokens == 0 || options.padded_tokens >= m.num_tokens, {kOp, "padded_tokens"},
      [&] { return fmt::format("0, or at least the {} tokens of the batch", m.num_tokens); },
      options.padded_tokens);
}

bool is_pure_prefill(const CommonMetadata& m) {
  for (int r = 0; r < m.num_reqs; ++r)
    if (m.num_computed_tokens(r) != 0) return false;
  return true;
}

std::int64_t slot_of(const CommonMetadata& m, int request, std::int64_t position, int block_size) {
  const std::int64_t index = position / block_size;
  const std::int32_t block =
      m.block_table.as<std::int32_t>()[request * m.block_table.strides[0] + index];
  check::require(block >= 0, {kOp, "block_table"}, "a block wherever a key goes",
                 [&] { return fmt::format("{} at [{}, {}]", block, request, index); });
  return std::int64_t{block} * block_size + position % block_size;
}

}  // namespace

std::vector<std::int64_t> make_slot_mapping(const CommonMetadata& m, int block_size,
                                            const SlotMappingOptions& options) {
  check_arguments(m, block_size, options);
  const auto size = static_cast<std::size_t>(std::max(m.num_tokens, options.padded_tokens));
  std::vector<std::int64_t> slots(size, -1);
  if (!m.block_table.defined()) return slots;

  const std::int64_t window =
      options.sliding_window && is_pure_prefill(m) ? *options.sliding_window : INT32_MAX;
  for (int r = 0; r < m.num_reqs; ++r) {
    const std::int64_t end = m.seq_lens[static_cast<std::size_t>(r)];
    const std::int64_t computed = m.num_computed_tokens(r);
    const std::int64_t first_token = m.query_start_loc[static_cast<std::size_t>(r)];
    for (std::int64_t p = std::max(computed, end - window); p < end; ++p)
      slots[static_cast<std::size_t>(first_token + p - computed)] = slot_of(m, r, p, block_size);
  }
  return slots;
}

}  // namespace attend
