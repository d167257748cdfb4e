// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "attend/dist/decode_context_parallel.h"
#include "core/check.h"
#include "dist/dcp/layout.h"
#include "dist/dcp/request_checks.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "dcp_slot_mapping";

struct Inputs {
  std::span<const std::int64_t> positions;
  std::span<const std::int32_t> starts;
  std::int64_t virtual_block = 0;  ///< positions that a table entry covers, over all ranks
};

/// Table entry of a token, checked.
std::int64_t block_of(const DcpSlotMappingArgs& a, const Inputs& in, std::int64_t request,
                      std::size_t token) {
  const std::int64_t column = in.positions[token] / in.virtual_block;
  check::require(
      column < a.block_table.shape[1], {kOp, "positions"},
      [&] {
        return fmt::format("below {} at index {} ({} table entries of {} tokens)",
                           a.block_table.shape[1] * in.virtual_block, token, a.block_table.shape[1],
                           in.virtual_block);
      },
      in.positions[token]);
  const std::int32_t block =
      a.block_table.as<std::int32_t>()[request * a.block_table.strides[0] + column];
  check::require(
      block >= 0, {kOp, "block_table"},
      [&] { return fmt::format("a block id >= 0 at [{}, {}]", request, column); }, block);
  return block;
}

Inputs checked_inputs(const DcpSlotMappingArgs& a) {
  dcp::check_layout(kOp, a.layout);
  dcp::check_rank(kOp, a.rank, a.layout);
  check::require(
      a.block_size > 0 && a.block_size % a.layout.interleave == 0, {kOp, "block_size"},
      [&] { return fmt::format("a positive multiple of the interleave, {}", a.layout.interleave); },
      a.block_size);
  Inputs in;
  in.positions = check::i64_array({kOp, "positions"}, a.positions, -1);
  in.starts = check::i32_array({kOp, "query_start_loc"}, a.query_start_loc, -1);
  in.virtual_block = std::int64_t{a.block_size} * a.layout.world_size;
  dcp::check_starts(kOp, in.starts, static_cast<std::int64_t>(in.positions.size()));
  check::tensor({kOp, "block_table"}, a.block_table, 2, {DType::i32});
  check::shape({kOp, "block_table"}, a.block_table,
               {static_cast<std::int64_t>(in.starts.size()) - 1, -1});
  check::unit_last_stride({kOp, "block_table"}, a.block_table);
  const auto slots = check::i64_array({kOp, "slot_mapping"}, a.slot_mapping, -1);
  check::require(
      slots.size() >= in.positions.size(), {kOp, "slot_mapping"},
      [&] { return fmt::format("at least {} entries", in.positions.size()); }, slots.size());
  check::no_overlap({kOp, "slot_mapping"}, a.slot_mapping, "positions", a.positions);
  check::no_overlap({kOp, "slot_mapping"}, a.slot_mapping, "query_start_loc", a.query_start_loc);
  check::no_overlap({kOp, "slot_mapping"}, a.slot_mapping, "block_table", a.block_table);
  return in;
}

/// Calls `use(token, slot)` for each token, with -1 for those of other ranks.
template <typename Use>
void for_each_slot(const DcpSlotMappingArgs& a, const Inputs& in, Use&& use) {
  for (std::size_t r = 0; r + 1 < in.starts.size(); ++r) {
    for (auto t = static_cast<std::size_t>(in.starts[r]);
         t < static_cast<std::size_t>(in.starts[r + 1]); ++t) {
      const std::int64_t position = in.positions[t];
      check::require(
          position >= 0, {kOp, "positions"}, [&] { return fmt::format(">= 0 at index {}", t); },
          position);
      if (dcp::owner(position, a.layout) != a.rank) {
        use(t, -1);
        continue;
      }
      // A virtual block holds whole periods, so the offset in it is a local index of its own.
      const std::int64_t offset = dcp::local_index(position % in.virtual_block, a.layout);
      use(t, block_of(a, in, static_cast<std::int64_t>(r), t) * a.block_size + offset);
    }
  }
}

}  // namespace

void dcp_slot_mapping(const DcpSlotMappingArgs& a) {
  const Inputs in = checked_inputs(a);
  for_each_slot(a, in, [](std::size_t, std::int64_t) {});  // only checks
  auto* slots = a.slot_mapping.as<std::int64_t>();
  for_each_slot(a, in, [&](std::size_t t, std::int64_t slot) { slots[t] = slot; });
  std::fill(slots + in.positions.size(), slots + a.slot_mapping.shape[0], -1);
}

}  // namespace attend
