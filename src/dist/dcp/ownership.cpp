// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "attend/dist/decode_context_parallel.h"
#include "core/check.h"
#include "dist/dcp/layout.h"

namespace attend {
namespace {

constexpr std::string_view kLengthsOp = "dcp_local_seq_lens";

void check_position(std::string_view op, std::int64_t position, const DcpLayout& layout) {
  dcp::check_layout(op, layout);
  check::require(position >= 0, {op, "position"}, ">= 0", position);
}

void check_lengths(std::span<const std::int32_t> seq_lens, std::int64_t ranks,
                   std::span<const std::int32_t> local) {
  const auto wanted = static_cast<std::int64_t>(seq_lens.size()) * ranks;
  check::require(
      static_cast<std::int64_t>(local.size()) == wanted, {kLengthsOp, "local"},
      [&] { return fmt::format("{} entries for {} sequences", wanted, seq_lens.size()); },
      local.size());
  const auto bad = std::ranges::find_if(seq_lens, [](std::int32_t n) { return n < 0; });
  if (bad == seq_lens.end()) return;
  check::fail(
      {kLengthsOp, "seq_lens"},
      [&] { return fmt::format(">= 0 at index {}", bad - seq_lens.begin()); }, *bad);
}

}  // namespace

namespace dcp {

void check_layout(std::string_view op, const DcpLayout& layout) {
  check::require(layout.world_size >= 1, {op, "world_size"}, ">= 1", layout.world_size);
  check::require(layout.interleave >= 1, {op, "interleave"}, ">= 1", layout.interleave);
}

void check_rank(std::string_view op, int rank, const DcpLayout& layout) {
  check::require(
      rank >= 0 && rank < layout.world_size, {op, "rank"},
      [&] { return fmt::format("a rank in [0, {})", layout.world_size); }, rank);
}

}  // namespace dcp

int dcp_owner(std::int64_t position, const DcpLayout& layout) {
  check_position("dcp_owner", position, layout);
  return dcp::owner(position, layout);
}

std::int64_t dcp_local_index(std::int64_t position, const DcpLayout& layout) {
  check_position("dcp_local_index", position, layout);
  return dcp::local_index(position, layout);
}

std::int64_t dcp_position(std::int64_t local_index, int rank, const DcpLayout& layout) {
  constexpr std::string_view kOp = "dcp_position";
  dcp::check_layout(kOp, layout);
  dcp::check_rank(kOp, rank, layout);
  check::require(local_index >= 0, {kOp, "local_index"}, ">= 0", local_index);
  const std::int64_t inside =
      std::int64_t{rank} * layout.interleave + local_index % layout.interleave;
  std::int64_t position = 0;
  const bool too_large =
      __builtin_mul_overflow(local_index / layout.interleave, dcp::period(layout), &position) ||
      __builtin_add_overflow(position, inside, &position);
  check::require(!too_large, {kOp, "local_index"}, "an index whose position is below 2^63",
                 local_index);
  return position;
}

void dcp_local_seq_lens(std::span<const std::int32_t> seq_lens, int rank, const DcpLayout& layout,
                        std::span<std::int32_t> local) {
  dcp::check_layout(kLengthsOp, layout);
  dcp::check_rank(kLengthsOp, rank, layout);
  check_lengths(seq_lens, 1, local);
  for (std::size_t i = 0; i < seq_lens.size(); ++i) {
    local[i] = static_cast<std::int32_t>(dcp::local_count(seq_lens[i], rank, layout));
  }
}

void dcp_local_seq_lens(std::span<const std::int32_t> seq_lens, const DcpLayout& layout,
                        std::span<std::int32_t> local) {
  dcp::check_layout(kLengthsOp, layout);
  check_lengths(seq_lens, layout.world_size, local);
  std::size_t next = 0;
  for (const std::int32_t length : seq_lens) {
    for (int rank = 0; rank < layout.world_size; ++rank) {
      local[next++] = static_cast<std::int32_t>(dcp::local_count(length, rank, layout));
    }
  }
}

}  // namespace attend
