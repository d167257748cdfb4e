// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/sparse_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::HostTensor;
using testing::Rng;

constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kMax = std::numeric_limits<std::int32_t>::max();

using Ints = std::vector<std::int32_t>;

ConstTensorView view(const Ints& v, std::int64_t rows, std::int64_t columns) {
  return {v.data(), DType::i32, {rows, columns}};
}
ConstTensorView view(const Ints& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}
TensorView written(Ints& v, std::int64_t rows, std::int64_t columns) {
  return {v.data(), DType::i32, {rows, columns}};
}
TensorView written(Ints& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}

// Two requests of three blocks of four tokens; entries that are no blocks of the ten in the cache.
struct Problem {
  Ints table = {7, 2, 10, 0, -1, 9};
  Ints out = Ints(16, 77), counts = Ints(2, 77);

  SparseIndexPages pages() const { return {view(table, 2, 3), 10, 4}; }
  ConvertReqIndexToGlobalIndexArgs args(const Ints& requests, const Ints& tokens) {
    const auto rows = static_cast<std::int64_t>(requests.size());
    const std::int64_t topk = static_cast<std::int64_t>(tokens.size()) / rows;
    out.resize(tokens.size());
    counts.resize(requests.size());
    return {.req_id = view(requests),
            .pages = pages(),
            .token_indices = view(tokens, rows, topk),
            .out = written(out, rows, topk),
            .valid_counts = written(counts)};
  }
};

TEST(ConvertReqIndex, FollowsTheTableAndNothingElse) {
  Problem p;
  const Ints requests = {0, 1}, tokens = {0, 3, 7,  8,  12, -1,      kMin, kMax,  //
                                          0, 5, 11, 11, -4, 1 << 20, 12,   1};
  convert_req_index_to_global_index(p.args(requests, tokens));
  EXPECT_THAT(p.out, ElementsAre(28, 31, 11, -1, -1, -1, -1, -1,  //
                                 0, -1, 39, 39, -1, -1, -1, 1));
  EXPECT_THAT(p.counts, ElementsAre(3, 4));
}

TEST(ConvertReqIndex, UnknownRequestsHaveNoRows) {
  Problem p;
  p.table.insert(p.table.end(), {1, 1, 1});  // past the end
  const Ints requests = {-1, 2, kMin, kMax}, tokens(8, 1);
  convert_req_index_to_global_index(p.args(requests, tokens));
  EXPECT_EQ(p.out, Ints(8, -1));
  EXPECT_EQ(p.counts, Ints(4, 0));
}

TEST(ConvertReqIndex, BlocksMayLieApart) {
  Problem p;
  const Ints requests = {0}, tokens = {1, 6, 8};
  auto args = p.args(requests, tokens);
  args.pages.block_stride_rows = 9;
  convert_req_index_to_global_index(args);
  EXPECT_THAT(p.out, ElementsAre(64, 20, -1));
  args.pages.num_blocks = 3;
  convert_req_index_to_global_index(args);
  EXPECT_THAT(p.out, ElementsAre(-1, 20, -1));
}

TEST(ConvertReqIndex, PrefillTokensReadTheWorkspace) {
  Problem p;
  const Ints requests(6, 0), ids = {1, -1, 0, 2, 5, kMin}, starts = {100, 3, -5};
  const Ints tokens = {0, -1, 96,   97, 0, 8, 1, 5, 20, 19, 7,    0,
                       5, 3,  kMax, 6,  0, 1, 2, 3, 0,  -2, kMax, 12};
  auto args = p.args(requests, tokens);
  args.prefill_workspace_request_ids = view(ids);
  args.prefill_workspace_starts = view(starts);
  args.workspace_rows = 100;
  convert_req_index_to_global_index(args);
  EXPECT_THAT(p.out, ElementsAre(3, -1, 99, -1, 28, -1, 29, 9, -1, -1, -1, -1, 0, -1, -1, 1, -1, -1,
                                 -1, -1, 28, -1, -1, -1));
  EXPECT_THAT(p.counts, ElementsAre(2, 3, 0, 2, 0, 1));
}

TEST(ConvertReqIndex, InPlaceAndOnAnyNumberOfWorkersTheSame) {
  Rng rng(9);
  constexpr std::int64_t kRows = 300, kTopk = 400;
  Problem p;
  Ints requests(kRows), tokens(kRows * kTopk);
  for (auto& r : requests) r = static_cast<std::int32_t>(rng.next() % 3);
  for (auto& t : tokens) t = static_cast<std::int32_t>(rng.next() % 14) - 1;
  const auto one = make_thread_pool(1);
  convert_req_index_to_global_index(p.args(requests, tokens), one.get());
  for (const int threads : {2, 7}) {
    const auto pool = make_thread_pool(threads);
    Problem q;
    Ints same = tokens;
    auto args = q.args(requests, same);
    args.out = written(same, kRows, kTopk);
    convert_req_index_to_global_index(args, pool.get());
    EXPECT_EQ(same, p.out);
    EXPECT_EQ(q.counts, p.counts);
  }
}

FilterAndConvertDcpIndexArgs dcp_args(Problem& p, const Ints& requests, const Ints& tokens) {
  const auto a = p.args(requests, tokens);
  return {.req_id = a.req_id,
          .pages = a.pages,
          .token_indices = a.token_indices,
          .out = a.out,
          .valid_counts = a.valid_counts};
}

TEST(FilterDcpIndex, KeepsTheTokensOfTheRank) {
  Problem p;
  // Rank 1 of 3, two tokens at a time: it holds 2 3, 8 9, 14 15, 20 21, 26 27, ...
  const Ints requests = {0}, tokens = {0, 2, 27, 9, -1, 15, 14, 4, 3, kMax, kMin, 2};
  auto args = dcp_args(p, requests, tokens);
  args.world_size = 3, args.interleave = 2, args.rank = 1;
  filter_and_convert_dcp_index(args);
  EXPECT_THAT(p.out, ElementsAre(-1, 28, -1, 31, -1, 9, 8, -1, 29, -1, -1, 28));
  EXPECT_THAT(p.counts, ElementsAre(6));
  args.compact_to_front = true;
  filter_and_convert_dcp_index(args);
  EXPECT_THAT(p.out, ElementsAre(28, 31, 9, 8, 29, 28, -1, -1, -1, -1, -1, -1));
  EXPECT_THAT(p.counts, ElementsAre(6));
}

TEST(FilterDcpIndex, EveryTokenIsHeldByOneRank) {
  const Ints requests = {1};
  Ints tokens(48), table = {5, 3, 8};
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(i);
  std::vector<int> holders(48);
  for (int rank = 0; rank < 4; ++rank) {
    Problem p;
    p.table = {0, 0, 0, 5, 3, 8};
    auto args = dcp_args(p, requests, tokens);
    args.world_size = 4, args.rank = rank;
    filter_and_convert_dcp_index(args);
    for (std::size_t i = 0; i < 48; ++i) {
      if (p.out[i] < 0) continue;
      ++holders[i];
      EXPECT_EQ(p.out[i], 4 * table[i / 16] + static_cast<std::int32_t>(i / 4 % 4));
    }
  }
  EXPECT_EQ(holders, std::vector<int>(48, 1));
}

template <typename Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "none";
}

TEST(SparseIndex, RefusesBadInputBeforeItWrites) {
  Problem p;
  const Ints requests = {0, 1}, tokens(16, 1), ids = {0, 0};
  const auto error = [&](auto&& change) {
    auto a = p.args(requests, tokens);
    change(a);
    const std::string text = error_of([&] { convert_req_index_to_global_index(a); });
    EXPECT_EQ(p.out, Ints(16, 77));
    EXPECT_EQ(p.counts, Ints(2, 77));
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.token_indices.dtype = DType::f32; }),
              HasSubstr("'token_indices'"));
  EXPECT_THAT(error([](auto& a) { a.token_indices.strides[1] = 2; }), HasSubstr("'token_indices'"));
  EXPECT_THAT(error([](auto& a) { a.token_indices.shape[1] = a.out.shape[1] = 0; }),
              HasSubstr("'token_indices'"));
  EXPECT_THAT(error([](auto& a) { a.out.shape[1] = 7; }), HasSubstr("'out'"));
  EXPECT_THAT(error([](auto& a) { a.out.strides[0] = 4; }), HasSubstr("'out'"));
  EXPECT_THAT(error([](auto& a) { a.req_id.shape[0] = 1; }), HasSubstr("'req_id'"));
  EXPECT_THAT(error([](auto& a) { a.valid_counts.shape[0] = 1; }), HasSubstr("'valid_counts'"));
  EXPECT_THAT(error([&](auto& a) { a.valid_counts.data = p.out.data(); }),
              HasSubstr("'valid_counts'"));
  EXPECT_THAT(error([&](auto& a) { a.pages.block_table = a.out; }), HasSubstr("'out'"));
  EXPECT_THAT(error([](auto& a) { a.pages.block_table.dtype = DType::u8; }),
              HasSubstr("'block_table'"));
  EXPECT_THAT(error([](auto& a) { a.pages.block_size = 0; }), HasSubstr("'block_size'"));
  EXPECT_THAT(error([](auto& a) { a.pages.num_blocks = -1; }), HasSubstr("'num_blocks'"));
  EXPECT_THAT(error([](auto& a) { a.pages.num_blocks = std::int64_t{1} << 61; }),
              HasSubstr("'num_blocks'"));
  EXPECT_THAT(error([](auto& a) { a.pages.num_blocks = (std::int64_t{1} << 29) + 1; }),
              HasSubstr("'num_blocks'"));
  EXPECT_THAT(error([](auto& a) { a.pages.block_stride_rows = 3; }),
              HasSubstr("'block_stride_rows'"));
  EXPECT_THAT(error([&](auto& a) { a.prefill_workspace_request_ids = view(ids); }),
              HasSubstr("'prefill_workspace_starts'"));
  EXPECT_THAT(error([&](auto& a) {
                a.prefill_workspace_request_ids = a.prefill_workspace_starts = view(ids);
                a.workspace_rows = std::int64_t{1} << 31;
              }),
              HasSubstr("'workspace_rows'"));
}

TEST(FilterDcpIndex, RefusesRanksThatThereAreNot) {
  Problem p;
  const Ints requests = {0, 1}, tokens(16, 1);
  const auto error = [&](int world_size, int interleave, int rank) {
    auto a = dcp_args(p, requests, tokens);
    a.world_size = world_size, a.interleave = interleave, a.rank = rank;
    const std::string text = error_of([&] { filter_and_convert_dcp_index(a); });
    EXPECT_EQ(p.out, Ints(16, 77));
    return text;
  };
  EXPECT_THAT(error(0, 1, 0), HasSubstr("'world_size'"));
  EXPECT_THAT(error(2, 0, 0), HasSubstr("'interleave'"));
  EXPECT_THAT(error(2, 1, 2), HasSubstr("'rank'"));
  EXPECT_THAT(error(2, 1, -1), HasSubstr("'rank'"));
}

}  // namespace
}  // namespace attend
