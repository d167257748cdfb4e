// SPDX-License-Identifier: Apache-2.0
#include "plan/shared_groups.h"

#include <algorithm>

namespace attend::plan {
namespace {

/// Most query rows of a kv head that a request of a group has in the automatic mode.
constexpr std::int64_t kMostRows = 256;

bool may_share(const CascadeInput& in, std::size_t r) {
  const AttentionPlanInput& b = in.batch;
  const std::int64_t tokens = b.query_start_loc[r + 1] - b.query_start_loc[r];
  return in.mode != CascadeMode::automatic ||
         tokens * (b.num_q_heads / b.num_kv_heads) <= kMostRows;
}

/// Whole pieces in the blocks that requests r and r + 1 both begin with.
std::int32_t pieces_alike(const CascadeInput& in, std::size_t r) {
  if (!may_share(in, r) || !may_share(in, r + 1)) return 0;
  const ConstTensorView& table = in.block_table;
  const std::int32_t* a =
      table.as<std::int32_t>() + static_cast<std::int64_t>(r) * table.strides[0];
  const std::int32_t* b = a + table.strides[0];
  const std::int64_t full =
      std::min(in.batch.seq_lens[r], in.batch.seq_lens[r + 1]) / in.block_size;
  const std::int64_t blocks = std::mismatch(a, a + full, b).first - a;
  return static_cast<std::int32_t>(blocks * in.block_size / kPieceSize);
}

}  // namespace

SharedGroups::SharedGroups(const CascadeInput& input) {
  const std::size_t num_reqs = input.batch.seq_lens.size();
  for (std::size_t r = 0; r + 1 < num_reqs; ++r) alike_.push_back(pieces_alike(input, r));
  todo_.push_back({0, static_cast<std::int32_t>(num_reqs), 0});
}

bool SharedGroups::next(SharedGroup& group) {
  while (!todo_.empty()) {
    const Range range = todo_.back();
    todo_.pop_back();
    if (range.end - range.begin < 2) continue;
    const auto first = alike_.begin() + range.begin, last = alike_.begin() + range.end - 1;
    const std::int32_t least = *std::min_element(first, last);
    // What is left between the places where neighbours share no more than the whole range does;
    // pushed from the right, so that the left one comes next.
    std::int32_t end = range.end;
    for (auto at = last; at != first;) {
      --at;
      if (*at > least) continue;
      const auto cut = static_cast<std::int32_t>(at - alike_.begin()) + 1;
      todo_.push_back({cut, end, least});
      end = cut;
    }
    todo_.push_back({range.begin, end, least});
    if (least <= range.outer_pieces) continue;
    group = {range.begin, range.end, least};
    return true;
  }
  return false;
}

}  // namespace attend::plan
