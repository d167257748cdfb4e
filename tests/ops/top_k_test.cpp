// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/top_k.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "attend/oracle/top_k.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::HostTensor;
using testing::Rng;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Ints = std::vector<std::int32_t>;
using Row = std::vector<float>;

ConstTensorView view(const Ints& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}

// The choice of one row, as both ops make it.
Ints choice_of(const Row& row, std::int64_t k) {
  const Ints start = {0}, end = {static_cast<std::int32_t>(row.size())};
  Ints out(static_cast<std::size_t>(k), 77), decoded = out;
  const ConstTensorView logits(row.data(), DType::f32, {1, end[0]});
  top_k_per_row_prefill({logits, view(start), view(end), {out.data(), DType::i32, {1, k}}});
  top_k_per_row_decode({logits, view(end), 1, {decoded.data(), DType::i32, {1, k}}});
  EXPECT_EQ(out, decoded);
  return out;
}

Ints oracle_choice(const Row& row, std::int64_t k) {
  std::vector<std::int64_t> indices(static_cast<std::size_t>(k));
  oracle::top_k(std::vector<double>(row.begin(), row.end()), indices);
  return {indices.begin(), indices.end()};
}

TEST(TopKPerRow, ChoosesTheHighestInAscendingOrder) {
  EXPECT_THAT(choice_of({1, 5, -2, 4, 9, 0}, 3), ElementsAre(1, 3, 4));
  EXPECT_THAT(choice_of({-1, -5, -2}, 1), ElementsAre(0));
}

TEST(TopKPerRow, ShortRowsAreFilledUp) {
  EXPECT_THAT(choice_of({3, kNan, 7}, 5), ElementsAre(0, 1, 2, -1, -1));
  EXPECT_THAT(choice_of({3, kNan, 7}, 3), ElementsAre(0, 1, 2));
  EXPECT_THAT(choice_of({}, 2), ElementsAre(-1, -1));
}

TEST(TopKPerRow, TheLowerOfEqualsWins) {
  EXPECT_THAT(choice_of({2, 7, 2, 2, 7, 2}, 4), ElementsAre(0, 1, 2, 4));
  EXPECT_THAT(choice_of({-1, -0.0F, 0.0F, -0.0F}, 2), ElementsAre(1, 2));
  EXPECT_THAT(choice_of({-1, 0.0F, -0.0F, 0.0F}, 2), ElementsAre(1, 2));
}

TEST(TopKPerRow, NanIsBelowEveryNumber) {
  EXPECT_THAT(choice_of({kNan, -kInf, -kNan, 1, kInf}, 3), ElementsAre(1, 3, 4));
  EXPECT_THAT(choice_of({-kNan, kNan, -kInf, kNan}, 3), ElementsAre(0, 1, 2));
  EXPECT_THAT(choice_of({kNan, 1e-45F, -1e-45F, -3e38F}, 2), ElementsAre(1, 2));
}

// Long rows of every kind that a guess from a sample may get wrong.
TEST(TopKPerRow, LongRowsAreChosenExactly) {
  Rng rng(12);
  SCOPED_TRACE(rng.trace());
  for (const std::size_t n : {8191, 8192, 50000, 131072}) {
    std::vector<Row> rows(9, Row(n));
    for (std::size_t i = 0; i < n; ++i) {
      rows[0][i] = rng.normal();
      rows[1][i] = static_cast<float>(i);
      rows[2][i] = -static_cast<float>(i);
      rows[3][i] = static_cast<float>(rng.next() % 7);
      rows[4][i] = 1.0F;
      rows[5][i] = i % 128 == 0 ? 5.0F : rng.normal();  // as a sample may see it
      rows[6][i] = i % 50 == 0 ? rng.normal() : kNan;
      rows[7][i] = i % 3 == 0 ? -kInf : kNan;
      rows[8][i] = i < n / 2 ? rng.normal() : 1e4F * rng.normal();
    }
    for (const std::int64_t k : {1, 512, 2048, 3072, 3073, 8000}) {
      for (std::size_t r = 0; r < rows.size(); ++r)
        ASSERT_EQ(choice_of(rows[r], k), oracle_choice(rows[r], k)) << n << " row " << r;
    }
  }
}

TEST(TopKPerRowPrefill, ReadsItsRangeAndCountsFromItsStart) {
  constexpr std::int64_t kWidth = 40, kStride = 43, kTopk = 3;
  Row logits(4 * kStride, kNan);
  const Ints starts = {5, 0, 40, 38}, ends = {12, 40, 40, 40};
  for (std::size_t t = 0; t < 4; ++t) {
    for (auto i = starts[t]; i < ends[t]; ++i)
      logits[t * kStride + static_cast<std::size_t>(i)] = static_cast<float>(i);
  }
  ConstTensorView in(logits.data(), DType::f32, {4, kWidth});
  in.strides[0] = kStride;
  Ints out(4 * 4, 77);
  TensorView wide(out.data(), DType::i32, {4, kTopk});
  wide.strides[0] = 4;
  top_k_per_row_prefill({in, view(starts), view(ends), wide});
  EXPECT_THAT(out, ElementsAre(4, 5, 6, 77, 37, 38, 39, 77, -1, -1, -1, 77, 0, 1, -1, 77));
}

TEST(TopKPerRowDecode, EachTokenOfAStepSeesOneMore) {
  Row logits(6 * 5, kNan);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i);
  const Ints lens = {5, 1};
  Ints out(6 * 2, 77);
  top_k_per_row_decode({ConstTensorView(logits.data(), DType::f32, {6, 5}), view(lens), 3,
                        TensorView(out.data(), DType::i32, {6, 2})});
  EXPECT_THAT(out, ElementsAre(1, 2, 2, 3, 3, 4, -1, -1, -1, -1, 0, -1));
}

TEST(TopKPerRowPrefill, ARowIsTheSameInAnyBatchOnAnyNumberOfWorkers) {
  Rng rng(13);
  SCOPED_TRACE(rng.trace());
  constexpr std::int64_t kRows = 17, kWidth = 20000, kTopk = 600;
  HostTensor logits(DType::f32, {kRows, kWidth});
  logits.fill_normal(rng);
  Ints starts(kRows), ends(kRows);
  for (std::size_t t = 0; t < kRows; ++t) {
    starts[t] = static_cast<std::int32_t>(rng.next() % 5000);
    ends[t] = static_cast<std::int32_t>(kWidth - static_cast<std::int64_t>(rng.next() % 9000));
  }
  Ints alone;
  for (std::size_t t = 0; t < kRows; ++t) {
    const float* row = logits.as<float>().data() + t * kWidth;
    const Ints chosen = choice_of(Row(row + starts[t], row + ends[t]), kTopk);
    alone.insert(alone.end(), chosen.begin(), chosen.end());
  }
  for (const int threads : {1, 2, 5, 32}) {
    const auto pool = make_thread_pool(threads);
    Ints out(kRows * kTopk);
    top_k_per_row_prefill(
        {logits, view(starts), view(ends), TensorView(out.data(), DType::i32, {kRows, kTopk})},
        pool.get());
    EXPECT_EQ(out, alone) << threads << " threads";
  }
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

TEST(TopKPerRowPrefill, RefusesBadInputBeforeItWrites) {
  HostTensor logits(DType::f32, {2, 8}), out(DType::i32, {2, 3});
  out.fill_bytes(0x5A);
  const auto before = out.snapshot();
  Ints starts = {0, 2}, ends = {8, 8};
  const auto error = [&](auto&& change) {
    TopKPerRowPrefillArgs a{logits, view(starts), view(ends), out};
    change(a);
    const std::string text = error_of([&] { top_k_per_row_prefill(a); });
    EXPECT_EQ(out.snapshot(), before);
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.logits.dtype = DType::bf16; }), HasSubstr("'logits'"));
  EXPECT_THAT(error([](auto& a) { a.logits.strides[1] = 2; }), HasSubstr("'logits'"));
  EXPECT_THAT(error([](auto& a) { a.logits.shape[1] = std::int64_t{1} << 31; }),
              HasSubstr("'logits'"));
  EXPECT_THAT(error([](auto& a) { a.out.dtype = DType::i64; }), HasSubstr("'out'"));
  EXPECT_THAT(error([](auto& a) { a.out.shape[1] = 0; }), HasSubstr("'out'"));
  EXPECT_THAT(error([](auto& a) { a.out.shape[0] = 1; }), HasSubstr("'out'"));
  EXPECT_THAT(error([](auto& a) { a.out.strides[0] = 2; }), HasSubstr("'out'"));
  EXPECT_THAT(error([&](auto& a) { a.out.data = logits.view().data; }), HasSubstr("'out'"));
  EXPECT_THAT(error([](auto& a) { a.row_starts.shape[0] = 1; }), HasSubstr("'row_starts'"));
  EXPECT_THAT(error([](auto& a) { a.row_ends.dtype = DType::i64; }), HasSubstr("'row_ends'"));
  for (const std::int32_t start : {-1, 9, std::numeric_limits<std::int32_t>::min()}) {
    starts[1] = start;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'row_starts'"));
  }
  starts[1] = 2;
  for (const std::int32_t end : {9, std::numeric_limits<std::int32_t>::max()}) {
    ends[1] = end;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'row_ends'"));
  }
}

TEST(TopKPerRowDecode, RefusesBadInputBeforeItWrites) {
  HostTensor logits(DType::f32, {4, 8}), out(DType::i32, {4, 3});
  out.fill_bytes(0x5A);
  const auto before = out.snapshot();
  const auto error = [&](const Ints& lens, int next_n) {
    const std::string text =
        error_of([&] { top_k_per_row_decode({logits, view(lens), next_n, out}); });
    EXPECT_EQ(out.snapshot(), before);
    return text;
  };
  EXPECT_THAT(error({8, 8}, 0), HasSubstr("'next_n'"));
  EXPECT_THAT(error({8}, 3), HasSubstr("'next_n'"));
  EXPECT_THAT(error({8}, 2), HasSubstr("'seq_lens'"));
  EXPECT_THAT(error({8, 9}, 2), HasSubstr("'seq_lens'"));
  EXPECT_THAT(error({-1, 8}, 2), HasSubstr("'seq_lens'"));
}

}  // namespace
}  // namespace attend
