// SPDX-License-Identifier: Apache-2.0
#include "ops/mla_schedule.h"

#include <algorithm>

#include "attend/ops/flash_mla.h"
#include "core/check.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "get_mla_metadata";
constexpr std::int64_t kBlockKeys = 64;
/// What a request costs besides its blocks, in blocks.
constexpr std::int64_t kOverhead = 5;

std::int64_t num_blocks(std::int32_t length) {
  return std::max<std::int64_t>(length - 1, 0) / kBlockKeys + 1;
}

}  // namespace

ops::MlaSchedule ops::mla_schedule(std::span<const std::int32_t> lengths, int num_parts) {
  MlaSchedule schedule;
  std::int64_t total = 0;
  for (const std::int32_t n : lengths) total += num_blocks(n) + kOverhead;
  const std::int64_t payload = (total + num_parts - 1) / num_parts + kOverhead;
  schedule.num_splits.assign(1, 0);
  std::size_t request = 0;
  std::int64_t block = 0;
  std::int32_t split = 0;
  for (int part = 0; part < num_parts; ++part) {
    std::array<std::int32_t, 8> row{static_cast<std::int32_t>(request),
                                    static_cast<std::int32_t>(block), 0, 0, split};
    std::int64_t left = payload;
    while (request < lengths.size()) {
      const std::int64_t rest = num_blocks(lengths[request]) - block;
      if (left < rest + kOverhead) {
        if (left > kOverhead) {
          block += left - kOverhead;
          ++split;
        }
        break;
      }
      schedule.num_splits.push_back(schedule.num_splits.back() + split + 1);
      left -= rest + kOverhead;
      ++request;
      block = split = 0;
    }
    const std::size_t last = block > 0 || request == 0 ? request : request - 1;
    const bool whole = block == 0;
    row[2] = static_cast<std::int32_t>(last);
    row[3] = static_cast<std::int32_t>(!whole               ? block
                                       : lengths[last] == 0 ? 0
                                                            : num_blocks(lengths[last]));
    schedule.parts.push_back(row);
  }
  return schedule;
}

int mla_num_sm_parts(int num_processors, int num_heads_q, int num_heads_k,
                     int num_q_tokens) noexcept {
  constexpr int kTileRows = 128;
  const int tiles = (num_heads_q / num_heads_k + kTileRows - 1) / kTileRows * num_q_tokens;
  return std::max(num_processors / 2 / num_heads_k / tiles, 1);
}

void get_mla_metadata(const GetMlaMetadataArgs& a) {
  const auto lengths = check::i32_array({kOp, "cache_seqlens"}, a.cache_seqlens, -1);
  check::require(!lengths.empty(), {kOp, "cache_seqlens"}, "at least 1 request", "none");
  for (std::size_t r = 0; r < lengths.size(); ++r)
    check::require(
        lengths[r] >= 0, {kOp, "cache_seqlens"}, [&] { return fmt::format(">= 0 at index {}", r); },
        lengths[r]);
  const check::Where rows{kOp, "tile_scheduler_metadata"}, splits{kOp, "num_splits"};
  check::tensor(rows, a.tile_scheduler_metadata, 2, {DType::i32});
  check::shape(rows, a.tile_scheduler_metadata, {-1, 8});
  check::contiguous(rows, a.tile_scheduler_metadata);
  const std::int64_t parts = a.tile_scheduler_metadata.shape[0];
  check::require(parts >= 1 && parts <= (1 << 20), rows, "from 1 to 2^20 rows", parts);
  check::tensor(splits, a.num_splits, 1, {DType::i32});
  check::shape(splits, a.num_splits, {static_cast<std::int64_t>(lengths.size()) + 1});
  check::contiguous(splits, a.num_splits);
  check::no_overlap(rows, a.tile_scheduler_metadata, "cache_seqlens", a.cache_seqlens);
  check::no_overlap(splits, a.num_splits, "cache_seqlens", a.cache_seqlens);
  check::no_overlap(splits, a.num_splits, "tile_scheduler_metadata", a.tile_scheduler_metadata);
  const ops::MlaSchedule schedule = ops::mla_schedule(lengths, static_cast<int>(parts));
  auto* to = a.tile_scheduler_metadata.as<std::int32_t>();
  for (const auto& row : schedule.parts) to = std::copy(row.begin(), row.end(), to);
  std::ranges::copy(schedule.num_splits, a.num_splits.as<std::int32_t>());
}

}  // namespace attend
