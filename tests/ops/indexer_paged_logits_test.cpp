// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "attend/core/error.h"
#include "indexer_batch.h"
#include "support/scale.h"

namespace attend {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::HostTensor;
using testing::IndexerBatch;
using testing::int_view;
using testing::Ints;
using testing::Rng;
using testing::same_bits;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr std::int32_t kLowest = std::numeric_limits<std::int32_t>::min(),
                       kHighest = std::numeric_limits<std::int32_t>::max();

/// The keys of a batch in shuffled pages, and NaN everywhere else; all rows are one request's.
struct Pages {
  Pages(Rng& rng, const IndexerBatch& batch, std::int64_t size)
      : block_size(size),
        needed((batch.keys + size - 1) / size),
        cache(DType::u8, {needed + 2, size, 132}) {
    cache.fill_bytes(0xFF);
    for (std::int64_t b = 0; b < needed; ++b) table.push_back(static_cast<std::int32_t>(b + 1));
    for (std::size_t i = table.size(); i > 1; --i) std::swap(table[i - 1], table[rng.next() % i]);
    for (std::int64_t j = 0; j < batch.keys; ++j) {
      auto* block =
          cache.as<std::uint8_t>().data() + table[static_cast<std::size_t>(j / size)] * size * 132;
      std::copy_n(batch.k.as<std::uint8_t>().data() + j * 128, 128,
                  block + indexer_cache::codes_at(j % size));
      std::memcpy(block + indexer_cache::scale_at(size, j % size),
                  batch.k_scale.as<float>().data() + j, 4);
    }
    table.insert(table.end(), {kLowest, kHighest});  // never needed
  }
  ConstTensorView table_view() const {
    return {table.data(), DType::i32, {1, static_cast<std::int64_t>(table.size())}};
  }

  std::int64_t block_size, needed;
  HostTensor cache;
  Ints table;
};

Fp8PagedMqaLogitsArgs paged_args(const IndexerBatch& batch, const Pages& pages, const Ints& lens,
                                 const TensorView& logits) {
  return {
      .q = ConstTensorView(batch.q.view().data, DType::fp8_e4m3, {1, batch.rows, batch.heads, 128}),
      .kv_cache = pages.cache,
      .weights = batch.weights,
      .context_lens = int_view(lens),
      .block_table = pages.table_view(),
      .schedule_metadata = {},
      .logits = logits};
}

class PagedIndexerLogits : public ::testing::TestWithParam<IsaLevel> {};
INSTANTIATE_TEST_SUITE_P(Levels, PagedIndexerLogits, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& param) { return std::string(to_string(param.param)); });

TEST_P(PagedIndexerLogits, HaveTheBitsOfContiguousKeys) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  IndexerBatch batch(rng, 3, 64, testing::scaled(1333, 333));
  const auto keys = static_cast<std::int32_t>(batch.keys);
  batch.ends = {keys - 2, keys - 1, keys};
  const auto expected = batch.logits(GetParam());
  const Ints lens = {keys};
  for (const std::int64_t size : {1, 7, 64, 256}) {
    const Pages pages(rng, batch, size);
    for (const int threads : {1, 3}) {
      const auto pool = make_thread_pool(threads);
      // Wider than the request, and not a multiple of anything.
      std::vector<float> out(static_cast<std::size_t>(3 * (keys + 41)), 5.0F);
      auto args = paged_args(batch, pages, lens, {out.data(), DType::f32, {3, keys + 41}});
      fp8_paged_mqa_logits(args, pool.get(), GetParam());
      for (std::int64_t row = 0; row < 3; ++row) {
        EXPECT_TRUE(same_bits(&out[static_cast<std::size_t>(row * (keys + 41))],
                              &expected[static_cast<std::size_t>(row * keys)], keys))
            << "row " << row << ", blocks of " << size << ", " << threads << " threads";
        EXPECT_EQ(out[static_cast<std::size_t>((row + 1) * (keys + 41) - 1)], -kInf);
      }
    }
  }
}

TEST_P(PagedIndexerLogits, AreTheSameInAnyBatch) {
  Rng rng(2);
  const IndexerBatch batch(rng, 4, 32, 100);
  const Pages pages(rng, batch, 16);
  const Ints lens = {100};
  std::vector<float> together(4 * 100), apart(4 * 100);
  fp8_paged_mqa_logits(paged_args(batch, pages, lens, {together.data(), DType::f32, {4, 100}}),
                       nullptr, GetParam());
  // The same tokens as requests of one token, with lengths of their own and a table with a row
  // for each.
  Ints table, own = {97, 98, 99, 100};
  for (int r = 0; r < 4; ++r) table.insert(table.end(), pages.table.begin(), pages.table.end());
  auto args = paged_args(batch, pages, own, {apart.data(), DType::f32, {4, 100}});
  args.q = {batch.q.view().data, DType::fp8_e4m3, {4, 1, 32, 128}};
  args.block_table = {table.data(), DType::i32, {4, static_cast<std::int64_t>(pages.table.size())}};
  fp8_paged_mqa_logits(args, nullptr, GetParam());
  EXPECT_TRUE(same_bits(together.data(), apart.data(), 400));
}

TEST(Fp8PagedMqaLogits, EachTokenSeesOneMoreOrAsManyAsItSays) {
  Rng rng(3);
  const IndexerBatch batch(rng, 3, 2, 9);
  const Pages pages(rng, batch, 4);
  const auto visible = [&](const Ints& lens, bool of_each) {
    std::vector<float> out(3 * 12, 0.0F);
    auto args = paged_args(batch, pages, lens, {out.data(), DType::f32, {3, 12}});
    if (of_each) args.context_lens = {lens.data(), DType::i32, {1, 3}};
    fp8_paged_mqa_logits(args);
    Ints counts;
    for (std::size_t row = 0; row < 3; ++row) {
      const auto begin = out.begin() + static_cast<std::ptrdiff_t>(12 * row);
      const auto count = std::find(begin, begin + 12, -kInf) - begin;
      EXPECT_THAT(std::vector<float>(begin + count, begin + 12), Each(-kInf));
      counts.push_back(static_cast<std::int32_t>(count));
    }
    return counts;
  };
  EXPECT_THAT(visible({9}, false), ElementsAre(7, 8, 9));
  EXPECT_THAT(visible({2}, false), ElementsAre(0, 1, 2));
  EXPECT_THAT(visible({0}, false), ElementsAre(0, 0, 0));
  EXPECT_THAT(visible({3, 9, 0}, true), ElementsAre(3, 9, 0));
}

TEST(PagedMqaLogitsMetadata, CutsSegmentsOf4BlocksIntoEqualParts) {
  // 1, 0, 3 and 2 segments of 256 tokens.
  const Ints lens = {256, 0, 513, 300};
  Ints rows(2 * 5, -9);
  get_paged_mqa_logits_metadata({int_view(lens), 64, TensorView(rows.data(), DType::i32, {5, 2})});
  EXPECT_THAT(rows, ElementsAre(0, 0, 2, 1, 3, 0, 3, 1, 4, 0));
  // More parts than segments: the last ones are empty.
  Ints many(2 * 9, -9);
  get_paged_mqa_logits_metadata({int_view(lens), 64, TensorView(many.data(), DType::i32, {9, 2})});
  EXPECT_THAT(many, ElementsAre(0, 0, 2, 0, 2, 1, 2, 2, 3, 0, 3, 1, 4, 0, 4, 0, 4, 0));
  // Of [B, next_n] the last column counts.
  const Ints columns = {1, 256, 0, 0, 512, 513, 7, 300};
  Ints same(2 * 5, -9);
  get_paged_mqa_logits_metadata({ConstTensorView(columns.data(), DType::i32, {4, 2}), 64,
                                 TensorView(same.data(), DType::i32, {5, 2})});
  EXPECT_EQ(same, rows);
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

TEST(Fp8PagedMqaLogits, RefusesBadInputBeforeItWrites) {
  Rng rng(4);
  const IndexerBatch batch(rng, 2, 3, 20);
  Pages pages(rng, batch, 4);
  HostTensor logits(DType::f32, {2, 24});
  logits.fill_bytes(0x5A);
  const auto before = logits.snapshot();
  Ints lens = {20}, schedule(6);
  const auto error = [&](auto&& change) {
    auto args = paged_args(batch, pages, lens, logits);
    change(args);
    const std::string text = error_of([&] { fp8_paged_mqa_logits(args); });
    EXPECT_EQ(logits.snapshot(), before);
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.q.dtype = DType::i8; }), HasSubstr("[fp8_paged_mqa_logits]"));
  EXPECT_THAT(error([](auto& a) { a.q.rank = 3; }), HasSubstr("'q'"));
  EXPECT_THAT(error([](auto& a) { a.kv_cache.shape[2] = 128; }), HasSubstr("'kv_cache'"));
  EXPECT_THAT(error([](auto& a) { a.kv_cache.strides[1] = 136; }), HasSubstr("without gaps"));
  EXPECT_THAT(error([](auto& a) { a.kv_cache.shape[1] = 0; }), HasSubstr("'kv_cache'"));
  EXPECT_THAT(error([](auto& a) { a.weights.shape[0] = 1; }), HasSubstr("'weights'"));
  EXPECT_THAT(error([](auto& a) { a.logits.shape[1] = 19; }), HasSubstr("max_model_len"));
  EXPECT_THAT(error([](auto& a) { a.logits.dtype = DType::bf16; }), HasSubstr("'logits'"));
  EXPECT_THAT(error([&](auto& a) { a.logits.data = pages.cache.view().data; }),
              HasSubstr("'logits'"));
  EXPECT_THAT(error([](auto& a) { a.block_table.shape[1] = 2; }), HasSubstr("5 blocks or more"));
  EXPECT_THAT(error([](auto& a) { a.block_table.dtype = DType::i64; }), HasSubstr("'block_table'"));
  const ConstTensorView given(schedule.data(), DType::i32, {3, 2});
  get_paged_mqa_logits_metadata(
      {int_view(lens), 64, TensorView(schedule.data(), DType::i32, {3, 2})});
  // That of another block size.
  EXPECT_THAT(error([&](auto& a) { a.schedule_metadata = given; }), HasSubstr("another row"));
  EXPECT_THAT(error([&](auto& a) { a.schedule_metadata = {schedule.data(), DType::i32, {2, 3}}; }),
              HasSubstr("'schedule_metadata'"));
  EXPECT_THAT(error([&](auto& a) { a.schedule_metadata = {schedule.data(), DType::i32, {1, 2}}; }),
              HasSubstr("'schedule_metadata'"));
  for (const std::int32_t length : {-1, 25, kLowest, kHighest}) {
    lens[0] = length;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'context_lens'")) << length;
  }
  lens[0] = 20;
  for (const std::int32_t block : {-1, 7, kLowest, kHighest}) {
    pages.table[2] = block;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'block_table'")) << block;
  }
}

TEST(PagedMqaLogitsMetadata, RefusesBadInputBeforeItWrites) {
  Ints lens = {5, 6}, rows(8, 77);
  const auto error = [&](auto&& change) {
    PagedMqaLogitsMetadataArgs args{int_view(lens), 64,
                                    TensorView(rows.data(), DType::i32, {4, 2})};
    change(args);
    const std::string text = error_of([&] { get_paged_mqa_logits_metadata(args); });
    EXPECT_THAT(rows, Each(77));
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.block_size = 0; }), HasSubstr("'block_size'"));
  EXPECT_THAT(error([](auto& a) { a.schedule_metadata.shape[0] = 1; }), HasSubstr("2 rows"));
  EXPECT_THAT(error([](auto& a) { a.schedule_metadata.dtype = DType::i64; }),
              HasSubstr("'schedule_metadata'"));
  EXPECT_THAT(error([](auto& a) { a.context_lens.dtype = DType::f32; }),
              HasSubstr("'context_lens'"));
  lens[1] = -1;
  EXPECT_THAT(error([](auto&) {}), HasSubstr("'context_lens'"));
}

}  // namespace
}  // namespace attend
