// SPDX-License-Identifier: Apache-2.0
// The schedule of FlashMLA: every block of every request in one part, in order.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/flash_mla.h"
#include "support/host_tensor.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

using ::testing::ElementsAre;
using Row = std::array<std::int32_t, 8>;
using Lengths = std::vector<std::int32_t>;

struct Schedule {
  std::vector<Row> parts;
  std::vector<std::int32_t> num_splits;
};

Schedule schedule(const Lengths& lengths, int num_parts) {
  const auto num_reqs = static_cast<std::int64_t>(lengths.size());
  HostTensor rows(DType::i32, {num_parts, 8}), splits(DType::i32, {num_reqs + 1});
  rows.fill_bytes(0x5a);
  splits.fill_bytes(0x5a);
  get_mla_metadata({{lengths.data(), DType::i32, {num_reqs}}, rows, splits});
  Schedule s;
  for (int p = 0; p < num_parts; ++p) {
    const auto row = rows.as<std::int32_t>().subspan(static_cast<std::size_t>(p) * 8, 8);
    std::ranges::copy(row, s.parts.emplace_back().begin());
  }
  s.num_splits.assign(splits.as<std::int32_t>().begin(), splits.as<std::int32_t>().end());
  return s;
}

int blocks_of(std::int32_t length) { return (length + 63) / 64; }
/// A request without keys costs as much as one with a block.
int cost_of(std::int32_t length) { return std::max(blocks_of(length), 1) + 5; }

int payload(const Lengths& lengths, int num_parts) {
  int total = 0;
  for (const std::int32_t n : lengths) total += cost_of(n);
  return (total + num_parts - 1) / num_parts + 5;
}

/// Walks through the parts as a kernel does.
void expect_covered(const Lengths& lengths, int num_parts) {
  SCOPED_TRACE(::testing::PrintToString(lengths) + " in " + std::to_string(num_parts));
  const Schedule s = schedule(lengths, num_parts);
  const auto num_reqs = static_cast<std::int32_t>(lengths.size());
  std::vector<std::int32_t> touched(lengths.size(), 0), done(lengths.size(), 0);
  std::int32_t next = 0;  // no part goes back behind this request
  for (const Row& part : s.parts) {
    ASSERT_THAT(std::vector(part.begin() + 5, part.end()), ElementsAre(0, 0, 0));
    if (part[0] == num_reqs) {  // nothing left
      ASSERT_EQ(part[2], num_reqs - 1);
      continue;
    }
    ASSERT_GE(part[0], next);
    ASSERT_LT(part[2], num_reqs);
    int cost = 0;
    for (std::int32_t r = part[0]; r <= part[2]; ++r) {
      const auto i = static_cast<std::size_t>(r);
      const int begin = r == part[0] ? part[1] : 0;
      const int end = r == part[2] ? part[3] : blocks_of(lengths[i]);
      ASSERT_EQ(begin, done[i]);
      ASSERT_LE(end, blocks_of(lengths[i]));
      ASSERT_EQ(r == part[0] ? part[4] : 0, touched[i]);
      done[i] = end;
      ++touched[i];
      cost += std::max(end - begin, 1) + 5;
    }
    ASSERT_LE(cost, payload(lengths, num_parts));
    next = part[2];
  }
  ASSERT_EQ(s.num_splits.front(), 0);
  for (std::size_t r = 0; r < lengths.size(); ++r) {
    ASSERT_EQ(done[r], blocks_of(lengths[r])) << r;
    ASSERT_GE(touched[r], 1) << r;
    ASSERT_EQ(s.num_splits[r + 1] - s.num_splits[r], touched[r]) << r;
  }
}

TEST(MlaSchedule, HasEveryBlockOnce) {
  Rng rng(17);
  SCOPED_TRACE(rng.trace());
  const int most = scaled(60, 10);
  for (int num_parts = 1; num_parts <= 200; ++num_parts) {
    for (int i = 0; i < 8; ++i) {
      Lengths lengths(static_cast<std::size_t>(rng.integer(1, most)));
      const std::int64_t longest = rng.pick(std::array{1, 64, 65, 500, 10000, 130000});
      for (std::int32_t& n : lengths)
        n = rng.chance(0.2) ? 0 : static_cast<std::int32_t>(rng.integer(1, longest));
      ASSERT_NO_FATAL_FAILURE(expect_covered(lengths, num_parts));
    }
    ASSERT_NO_FATAL_FAILURE(expect_covered({0}, num_parts));
    ASSERT_NO_FATAL_FAILURE(expect_covered({0, 0, 0}, num_parts));
    ASSERT_NO_FATAL_FAILURE(expect_covered({1 << 20}, num_parts));
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(MlaSchedule, IsFlashMlas) {
  Schedule s = schedule({640}, 1);  // 10 blocks: payload 20
  EXPECT_THAT(s.parts, ElementsAre(Row{0, 0, 0, 10, 0}));
  EXPECT_THAT(s.num_splits, ElementsAre(0, 1));
  s = schedule({640}, 2);  // payload 13, so 8 blocks and 5
  EXPECT_THAT(s.parts, ElementsAre(Row{0, 0, 0, 8, 0}, Row{0, 8, 0, 10, 1}));
  EXPECT_THAT(s.num_splits, ElementsAre(0, 2));
  s = schedule({0, 65}, 3);  // costs 6 and 7, payload 10; the last part is left over
  EXPECT_THAT(s.parts, ElementsAre(Row{0, 0, 0, 0, 0}, Row{1, 0, 1, 2, 0}, Row{2, 0, 1, 2, 0}));
  EXPECT_THAT(s.num_splits, ElementsAre(0, 1, 2));
  s = schedule({1000, 100, 3000}, 4);  // 16, 2 and 47 blocks: payload 25
  EXPECT_THAT(s.parts, ElementsAre(Row{0, 0, 0, 16, 0}, Row{1, 0, 2, 13, 0}, Row{2, 13, 2, 33, 1},
                                   Row{2, 33, 2, 47, 2}));
  EXPECT_THAT(s.num_splits, ElementsAre(0, 1, 2, 5));
  s = schedule({64, 0}, 1);  // ends with a request without keys
  EXPECT_THAT(s.parts, ElementsAre(Row{0, 0, 1, 0, 0}));
  EXPECT_THAT(s.num_splits, ElementsAre(0, 1, 2));
}

TEST(MlaSchedule, HasAPartForHalfAProcessorOverTiles) {
  EXPECT_EQ(mla_num_sm_parts(132, 128, 1, 1), 66);
  EXPECT_EQ(mla_num_sm_parts(132, 129, 1, 1), 33);
  EXPECT_EQ(mla_num_sm_parts(132, 16, 1, 1), 66);
  EXPECT_EQ(mla_num_sm_parts(132, 128, 1, 4), 16);
  EXPECT_EQ(mla_num_sm_parts(133, 128, 2, 1), 33);
  EXPECT_EQ(mla_num_sm_parts(132, 128, 1, 1000), 1);
  EXPECT_EQ(mla_num_sm_parts(1, 1, 1, 1), 1);
}

class MlaScheduleBadInput : public ::testing::Test {
 protected:
  template <typename Change>
  std::string refusal(Change&& change) {
    rows_.fill_bytes(0x5a);
    splits_.fill_bytes(0x5a);
    lengths_.as<std::int32_t>()[0] = 100;
    lengths_.as<std::int32_t>()[1] = 0;
    GetMlaMetadataArgs a{lengths_, rows_, splits_};
    change(a);
    const auto rows = rows_.snapshot(), splits = splits_.snapshot(), lengths = lengths_.snapshot();
    std::string text = "accepted";
    try {
      get_mla_metadata(a);
      return text;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "get_mla_metadata");
      text = e.argument();
    }
    EXPECT_EQ(rows_.snapshot(), rows);
    EXPECT_EQ(splits_.snapshot(), splits);
    EXPECT_EQ(lengths_.snapshot(), lengths);
    return text;
  }
  HostTensor lengths_{DType::i32, {2}}, rows_{DType::i32, {4, 8}}, splits_{DType::i32, {3}};
};

TEST_F(MlaScheduleBadInput, NamesTheArgumentAndWritesNothing) {
  EXPECT_EQ(refusal([](auto&) {}), "accepted");
  EXPECT_EQ(refusal([](auto& a) { a.cache_seqlens = {}; }), "cache_seqlens");
  EXPECT_EQ(refusal([](auto& a) { a.cache_seqlens.dtype = DType::i64; }), "cache_seqlens");
  EXPECT_EQ(refusal([](auto& a) { a.cache_seqlens.shape[0] = 0; }), "cache_seqlens");
  EXPECT_EQ(refusal([&](auto&) { lengths_.as<std::int32_t>()[1] = -1; }), "cache_seqlens");
  EXPECT_EQ(refusal([](auto& a) { a.tile_scheduler_metadata = {}; }), "tile_scheduler_metadata");
  EXPECT_EQ(refusal([](auto& a) { a.tile_scheduler_metadata.dtype = DType::f32; }),
            "tile_scheduler_metadata");
  EXPECT_EQ(refusal([](auto& a) { a.tile_scheduler_metadata.shape[1] = 7; }),
            "tile_scheduler_metadata");
  EXPECT_EQ(refusal([](auto& a) { a.tile_scheduler_metadata.shape[0] = 0; }),
            "tile_scheduler_metadata");
  EXPECT_EQ(refusal([](auto& a) { a.tile_scheduler_metadata.strides[0] = 16; }),
            "tile_scheduler_metadata");
  EXPECT_EQ(refusal([](auto& a) { a.num_splits = {}; }), "num_splits");
  EXPECT_EQ(refusal([](auto& a) { a.num_splits.dtype = DType::i64; }), "num_splits");
  EXPECT_EQ(refusal([](auto& a) { a.num_splits.shape[0] = 2; }), "num_splits");
  EXPECT_EQ(refusal([](auto& a) { a.num_splits.strides[0] = 2; }), "num_splits");
  EXPECT_EQ(refusal([&](auto& a) { a.num_splits.data = rows_.view().data; }), "num_splits");
  EXPECT_EQ(refusal([&](auto& a) { a.cache_seqlens = rows_.view().select(0, 1).slice(0, 0, 2); }),
            "tile_scheduler_metadata");
}

}  // namespace
}  // namespace attend::testing
