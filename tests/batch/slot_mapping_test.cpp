// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/slot_mapping.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <functional>

#include "attend/core/error.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int kSlotBlockSize = 4;

/// Requests of two blocks in blocks 7 and 2, or 5 and 0.
struct SlotBatch {
  HostTensor table{DType::i32, {2, 2}};
  CommonMetadata m;

  SlotBatch(const std::vector<int>& query_lens, const std::vector<int>& seq_lens) {
    const std::vector<std::int32_t> blocks = {7, 2, 5, 0};
    std::ranges::copy(blocks, table.as<std::int32_t>().begin());
    m.query_start_loc = {0};
    m.num_reqs = static_cast<int>(seq_lens.size());
    m.seq_lens = seq_lens;
    for (const int query_len : query_lens)
      m.query_start_loc.push_back(m.query_start_loc.back() + query_len);
    m.num_tokens = m.query_start_loc.back();
    m.max_query_len = m.max_seq_len = 2 * kSlotBlockSize;
    m.block_table = table;
  }
};

TEST(SlotMapping, FollowsTheBlockTable) {
  const SlotBatch b({3, 1}, {5, 8});
  EXPECT_THAT(make_slot_mapping(b.m, kSlotBlockSize), ElementsAre(30, 31, 8, 3));
}

TEST(SlotMapping, PadsGraphsWithNoSlot) {
  const SlotBatch b({1, 1}, {5, 8});
  EXPECT_THAT(make_slot_mapping(b.m, kSlotBlockSize, {.padded_tokens = 4}),
              ElementsAre(8, 3, -1, -1));
  EXPECT_THAT(make_slot_mapping(b.m, kSlotBlockSize, {.padded_tokens = 2}), ElementsAre(8, 3));
}

TEST(SlotMapping, ProfilingWritesNothing) {
  SlotBatch b({5, 8}, {5, 8});
  b.m.block_table = {};
  EXPECT_THAT(make_slot_mapping(b.m, kSlotBlockSize), AllOf(::testing::SizeIs(13), Each(-1)));
}

TEST(SlotMapping, OfNoRequestsIsEmpty) {
  SlotBatch b({}, {});
  b.m.max_query_len = b.m.max_seq_len = 0;
  EXPECT_THAT(make_slot_mapping(b.m, kSlotBlockSize), IsEmpty());
}

TEST(SlotMapping, PromptsLeaveOutWhatTheWindowHides) {
  SlotBatch b({6, 2}, {6, 2});
  b.table.as<std::int32_t>()[0] = -1;  // the block of tokens 0 to 3 was never needed
  EXPECT_THAT(make_slot_mapping(b.m, kSlotBlockSize, {.sliding_window = 2}),
              ElementsAre(-1, -1, -1, -1, 8, 9, 20, 21));
  EXPECT_THROW(make_slot_mapping(b.m, kSlotBlockSize), InvalidArgument);
}

TEST(SlotMapping, QueriesOverComputedTokensReadEveryNewKeyFromTheCache) {
  const SlotBatch b({6, 2}, {6, 3});
  EXPECT_THAT(make_slot_mapping(b.m, kSlotBlockSize, {.sliding_window = 2}),
              ElementsAre(28, 29, 30, 31, 8, 9, 21, 22));
}

TEST(SlotMapping, AWindowWiderThanPromptsLeavesOutNothing) {
  const SlotBatch b({6, 2}, {6, 2});
  EXPECT_EQ(make_slot_mapping(b.m, kSlotBlockSize, {.sliding_window = 6}),
            make_slot_mapping(b.m, kSlotBlockSize));
}

TEST(SlotMapping, BlocksWithoutNewKeysAreNotRead) {
  SlotBatch b({1, 1}, {5, 8});
  b.table.as<std::int32_t>()[0] = -3;
  EXPECT_THAT(make_slot_mapping(b.m, kSlotBlockSize), ElementsAre(8, 3));
}

TEST(SlotMapping, StatesWhatIsWrong) {
  const auto message = [](const std::function<void(SlotBatch&)>& spoil, int block_size,
                          const SlotMappingOptions& options) -> std::string {
    SlotBatch b({3, 1}, {5, 8});
    spoil(b);
    try {
      make_slot_mapping(b.m, block_size, options);
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "no error";
  };
  const auto nothing = [](SlotBatch&) {};
  EXPECT_THAT(message(nothing, 0, {}), HasSubstr("[make_slot_mapping] argument 'block_size'"));
  EXPECT_THAT(message(nothing, 4, {.sliding_window = 0}), HasSubstr("'sliding_window'"));
  EXPECT_THAT(message(nothing, 4, {.padded_tokens = 3}),
              AllOf(HasSubstr("'padded_tokens'"), HasSubstr("at least the 4 tokens")));
  EXPECT_THAT(message(nothing, 4, {.padded_tokens = -1}), HasSubstr("'padded_tokens'"));
  EXPECT_THAT(message(nothing, 3, {}), HasSubstr("'block_table'"));
  EXPECT_THAT(message([](SlotBatch& b) { b.table.as<std::int32_t>()[3] = -1; }, 4, {}),
              AllOf(HasSubstr("'block_table'"), HasSubstr("-1 at [1, 1]")));
  EXPECT_THAT(message([](SlotBatch& b) { b.m.seq_lens[1] = 0; }, 4, {}), HasSubstr("'seq_lens'"));
}

}  // namespace
}  // namespace attend::testing
