// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "attend/dist/decode_context_parallel.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;

constexpr std::int64_t kTokens = 200;

/// Deals tokens out like cards, I at a time: what the formulas must agree with.
struct Dealt {
  explicit Dealt(const DcpLayout& layout) : held(static_cast<std::size_t>(layout.world_size)) {
    for (std::int64_t p = 0; p < kTokens; ++p) {
      owner.push_back(turn);
      local.push_back(static_cast<std::int64_t>(held[static_cast<std::size_t>(turn)].size()));
      held[static_cast<std::size_t>(turn)].push_back(p);
      if (++given < layout.interleave) continue;
      given = 0;
      turn = (turn + 1) % layout.world_size;
    }
  }
  std::vector<std::vector<std::int64_t>> held;  ///< positions of each rank, in order
  std::vector<int> owner;                       ///< [kTokens]
  std::vector<std::int64_t> local;              ///< [kTokens]

 private:
  int turn = 0, given = 0;
};

void for_each_layout(const std::function<void(const DcpLayout&)>& body) {
  for (int n = 1; n <= 8; ++n) {
    for (int interleave = 1; interleave <= 16; ++interleave) {
      SCOPED_TRACE("N " + std::to_string(n) + " I " + std::to_string(interleave));
      body({n, interleave});
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TEST(DcpOwnership, OwnersAndIndicesAreThoseOfDealingTokensOut) {
  for_each_layout([](const DcpLayout& layout) {
    const Dealt dealt(layout);
    for (std::int64_t p = 0; p < kTokens; ++p) {
      const auto i = static_cast<std::size_t>(p);
      ASSERT_EQ(dcp_owner(p, layout), dealt.owner[i]) << p;
      ASSERT_EQ(dcp_local_index(p, layout), dealt.local[i]) << p;
      ASSERT_EQ(dcp_position(dealt.local[i], dealt.owner[i], layout), p);
    }
  });
}

TEST(DcpOwnership, LocalLengthsCountTheTokensOfARank) {
  std::vector<std::int32_t> lengths(kTokens);
  std::iota(lengths.begin(), lengths.end(), 0);
  for_each_layout([&](const DcpLayout& layout) {
    const Dealt dealt(layout);
    const auto n = static_cast<std::size_t>(layout.world_size);
    std::vector<std::int32_t> all(lengths.size() * n, -7);
    dcp_local_seq_lens(lengths, layout, all);
    for (std::size_t r = 0; r < n; ++r) {
      std::vector<std::int32_t> local = lengths;
      dcp_local_seq_lens(local, static_cast<int>(r), layout, local);  // in place
      for (std::size_t i = 0; i < lengths.size(); ++i) {
        const auto below = std::ranges::lower_bound(dealt.held[r], lengths[i]);
        ASSERT_EQ(local[i], below - dealt.held[r].begin()) << "length " << i << " rank " << r;
        ASSERT_EQ(all[i * n + r], local[i]) << "length " << i << " rank " << r;
      }
    }
  });
}

/// One batch: request 0 has positions 0 .. kTokens - 1, request 1 only its last 5.
struct SlotProblem {
  SlotProblem(int block_size, const DcpLayout& layout, std::int64_t padding)
      : positions(DType::i64, {kTokens + 5}),
        starts(DType::i32, {3}),
        table(DType::i32, {2, columns(block_size, layout)}),
        slots(DType::i64, {kTokens + 5 + padding}) {
    for (std::int64_t t = 0; t < kTokens + 5; ++t) {
      positions.as<std::int64_t>()[static_cast<std::size_t>(t)] = t < kTokens ? t : t - 5;
    }
    starts.as<std::int32_t>()[1] = kTokens;
    starts.as<std::int32_t>()[2] = kTokens + 5;
    std::int32_t next = 9000;
    for (auto& block : table.as<std::int32_t>()) block = next -= 3;
    slots.fill_bytes(0x5A);
    args = {.positions = positions,
            .query_start_loc = starts,
            .block_table = table,
            .block_size = block_size,
            .layout = layout,
            .slot_mapping = slots};
  }
  static std::int64_t columns(int block_size, const DcpLayout& layout) {
    const std::int64_t covered = std::int64_t{block_size} * layout.world_size;
    return (kTokens + covered - 1) / covered;
  }
  HostTensor positions, starts, table, slots;
  DcpSlotMappingArgs args;
};

TEST(DcpSlotMapping, IsTheLocalIndexThroughTheBlockTable) {
  for_each_layout([](const DcpLayout& layout) {
    const Dealt dealt(layout);
    for (const int blocks : {1, 2, 3}) {
      const int block_size = blocks * layout.interleave;
      SlotProblem p(block_size, layout, 9);
      for (int rank = 0; rank < layout.world_size; ++rank) {
        p.slots.fill_bytes(0x5A);
        p.args.rank = rank;
        dcp_slot_mapping(p.args);
        for (std::int64_t t = 0; t < p.slots.numel(); ++t) {
          std::int64_t want = -1;
          const auto position = static_cast<std::size_t>(t < kTokens ? t : t - 5);
          if (t < kTokens + 5 && dealt.owner[position] == rank) {
            const std::int64_t local = dealt.local[position];
            const double block =
                testing::get(p.table.view(), {t < kTokens ? 0 : 1, local / block_size});
            want = static_cast<std::int64_t>(block) * block_size + local % block_size;
          }
          ASSERT_EQ(p.slots.as<std::int64_t>()[static_cast<std::size_t>(t)], want)
              << "token " << t << " rank " << rank << " block size " << block_size;
        }
      }
    }
  });
}

TEST(DcpSlotMapping, ReadsOnlyTheTableEntriesOfItsOwnTokens) {
  SlotProblem p(4, {2, 4}, 0);
  p.args.rank = 1;
  // Of the last 4 positions, 196 .. 199, all belong to rank 1; without them rank 1 has nothing
  // there.
  p.args.positions.shape[0] = 196;
  p.starts.as<std::int32_t>()[1] = p.starts.as<std::int32_t>()[2] = 196;
  p.table.as<std::int32_t>()[static_cast<std::size_t>(p.table.view().shape[1] - 1)] = -5;
  EXPECT_NO_THROW(dcp_slot_mapping(p.args));
  p.args.rank = 0;
  EXPECT_THROW(dcp_slot_mapping(p.args), InvalidArgument);
}

/// Argument that the call blames.
std::string blamed(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgument& e) {
    return e.argument();
  }
  return "nothing";
}

TEST(DcpOwnership, BadInput) {
  EXPECT_EQ(blamed([] { dcp_owner(-1, {2, 1}); }), "position");
  EXPECT_EQ(blamed([] { dcp_owner(0, {0, 1}); }), "world_size");
  EXPECT_EQ(blamed([] { dcp_local_index(0, {2, 0}); }), "interleave");
  EXPECT_EQ(blamed([] { dcp_local_index(-3, {2, 1}); }), "position");
  EXPECT_EQ(blamed([] { dcp_position(0, 2, {2, 1}); }), "rank");
  EXPECT_EQ(blamed([] { dcp_position(0, -1, {2, 1}); }), "rank");
  EXPECT_EQ(blamed([] { dcp_position(-1, 0, {2, 1}); }), "local_index");
  EXPECT_EQ(blamed([] { dcp_position(INT64_MAX / 2, 1, {2, 1}); }), "nothing");
  EXPECT_EQ(blamed([] { dcp_position(INT64_MAX / 2 + 1, 1, {2, 1}); }), "local_index");
  EXPECT_EQ(blamed([] { dcp_position(INT64_MAX, 1, {INT32_MAX, INT32_MAX}); }), "local_index");

  std::vector<std::int32_t> lengths = {3, 0, 5};
  std::vector<std::int32_t> local(3, 77), all(6, 77);
  EXPECT_EQ(blamed([&] { dcp_local_seq_lens(lengths, {2, 1}, local); }), "local");
  EXPECT_EQ(blamed([&] { dcp_local_seq_lens(lengths, 0, {2, 1}, all); }), "local");
  EXPECT_EQ(blamed([&] { dcp_local_seq_lens(lengths, 2, {2, 1}, local); }), "rank");
  EXPECT_EQ(blamed([&] { dcp_local_seq_lens(lengths, {2, -1}, all); }), "interleave");
  lengths[2] = -1;
  EXPECT_EQ(blamed([&] { dcp_local_seq_lens(lengths, {2, 1}, all); }), "seq_lens");
  EXPECT_EQ(blamed([&] { dcp_local_seq_lens(lengths, 0, {2, 1}, local); }), "seq_lens");
  EXPECT_EQ(local, std::vector<std::int32_t>(3, 77));
  EXPECT_EQ(all, std::vector<std::int32_t>(6, 77));
}

TEST(DcpSlotMapping, BadInputIsRefusedBeforeAnythingIsWritten) {
  const auto blame = [](const std::function<void(SlotProblem&)>& change) {
    SlotProblem p(8, {2, 4}, 3);
    const auto before = p.slots.snapshot();
    change(p);
    const std::string argument = blamed([&] { dcp_slot_mapping(p.args); });
    return argument != "nothing" && p.slots.snapshot() != before ? argument + ", but wrote"
                                                                 : argument;
  };
  EXPECT_EQ(blame([](auto&) {}), "nothing");
  EXPECT_EQ(blame([](auto& p) { p.args.layout.world_size = 0; }), "world_size");
  EXPECT_EQ(blame([](auto& p) { p.args.layout.interleave = 3; }), "block_size");
  EXPECT_EQ(blame([](auto& p) { p.args.block_size = 0; }), "block_size");
  EXPECT_EQ(blame([](auto& p) { p.args.rank = 2; }), "rank");
  EXPECT_EQ(blame([](auto& p) { p.args.positions.dtype = DType::i32; }), "positions");
  EXPECT_EQ(blame([](auto& p) { p.positions.template as<std::int64_t>()[204] = -1; }), "positions");
  EXPECT_EQ(blame([](auto& p) { p.positions.template as<std::int64_t>()[204] = 208; }),
            "positions");
  EXPECT_EQ(blame([](auto& p) { p.positions.template as<std::int64_t>()[204] = INT64_MAX; }),
            "nothing");  // of rank 1
  EXPECT_EQ(blame([](auto& p) { p.positions.template as<std::int64_t>()[204] = INT64_MAX - 4; }),
            "positions");
  EXPECT_EQ(blame([](auto& p) { p.starts.template as<std::int32_t>()[0] = 1; }), "query_start_loc");
  EXPECT_EQ(blame([](auto& p) { p.starts.template as<std::int32_t>()[1] = 206; }),
            "query_start_loc");
  EXPECT_EQ(blame([](auto& p) { p.starts.template as<std::int32_t>()[2] = 204; }),
            "query_start_loc");
  EXPECT_EQ(blame([](auto& p) { p.args.query_start_loc.shape[0] = 0; }), "query_start_loc");
  EXPECT_EQ(blame([](auto& p) { p.args.block_table.shape[0] = 1; }), "block_table");
  EXPECT_EQ(blame([](auto& p) { p.args.block_table.dtype = DType::i64; }), "block_table");
  EXPECT_EQ(blame([](auto& p) { p.table.template as<std::int32_t>()[3] = -1; }), "block_table");
  EXPECT_EQ(blame([](auto& p) { p.args.slot_mapping.shape[0] = 204; }), "slot_mapping");
  EXPECT_EQ(blame([](auto& p) { p.args.slot_mapping.data = p.positions.view().data; }),
            "slot_mapping");
}

}  // namespace
}  // namespace attend
