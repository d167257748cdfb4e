// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/indexer_logits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "attend/core/error.h"
#include "attend/ops/top_k.h"
#include "attend/oracle/indexer.h"
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
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class IndexerLogits : public ::testing::TestWithParam<IsaLevel> {};
INSTANTIATE_TEST_SUITE_P(Levels, IndexerLogits, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& param) { return std::string(to_string(param.param)); });

// Numbers so small that every sum is exact.
TEST_P(IndexerLogits, AreWeightedSumsOfPositiveProducts) {
  HostTensor q(DType::fp8_e4m3, {1, 3, 128}), k(DType::fp8_e4m3, {2, 128});
  const auto set = [](const HostTensor& t, std::size_t at, float x) {
    t.as<fp8_e4m3>()[at] = to_fp8_e4m3(x);
  };
  set(q, 0, 1), set(q, 127, 2), set(q, 128 + 5, -3), set(q, 256 + 64, 4);
  set(k, 0, 2), set(k, 127, 1), set(k, 5, 1), set(k, 64, -1);  // products 4, -3 and -4
  set(k, 128 + 5, -2), set(k, 128 + 64, 0.5);                  // 0, 6 and 2
  const std::vector<float> weights = {10, -1, 100}, scales = {0.5, 2};
  const Ints start = {0}, end = {2};
  std::vector<float> out(2);
  fp8_mqa_logits({.q = q,
                  .k = k,
                  .k_scale = {scales.data(), DType::f32, {2}},
                  .weights = {weights.data(), DType::f32, {1, 3}},
                  .ks = int_view(start),
                  .ke = int_view(end),
                  .logits = {out.data(), DType::f32, {1, 2}}},
                 nullptr, GetParam());
  EXPECT_THAT(out, ElementsAre(20, 388));
}

TEST_P(IndexerLogits, OtherKeysAreMinusInfinityOrUntouched) {
  Rng rng(1);
  IndexerBatch batch(rng, 3, 4, 70);
  batch.starts = {0, 33, 20};
  batch.ends = {31, 70, 20};
  for (const bool clean : {true, false}) {
    std::vector<float> out(3 * 70, 77.0F);
    auto args = batch.args({out.data(), DType::f32, {3, 70}});
    args.clean_logits = clean;
    fp8_mqa_logits(args, nullptr, GetParam());
    for (std::size_t i = 0; i < out.size(); ++i) {
      const auto row = i / 70;
      const auto key = static_cast<std::int32_t>(i % 70);
      const bool sees = key >= batch.starts[row] && key < batch.ends[row];
      EXPECT_EQ(out[i] == (clean ? -kInf : 77.0F), !sees) << i;
    }
  }
}

TEST_P(IndexerLogits, KeysThatNoRowSeesAreNotRead) {
  Rng rng(2);
  IndexerBatch batch(rng, 2, 3, 200);
  batch.starts = {40, 45};
  batch.ends = {41, 75};
  const auto expected = batch.logits(GetParam());
  for (std::size_t j = 0; j < 200; ++j) {
    if (j >= 40 && j < 75) continue;
    std::fill_n(batch.k.as<std::uint8_t>().begin() + static_cast<std::ptrdiff_t>(128 * j), 128,
                0x7F);
    batch.k_scale.as<float>()[j] = kNan;
  }
  const auto got = batch.logits(GetParam());
  EXPECT_TRUE(same_bits(got.data(), expected.data(), 400));
}

// A row alone with one key has the bits that it has in any company.
TEST_P(IndexerLogits, ALogitDependsOnItsRowAndKeyOnly) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  for (const int heads : {1, 5, 16, 17, 33, 64}) {
    const IndexerBatch batch(rng, 67, heads, testing::scaled(1100, 130));
    const auto all = batch.logits(GetParam());
    for (int i = 0; i < 60; ++i) {
      const auto row = rng.integer(0, batch.rows - 1), key = rng.integer(0, batch.keys - 1);
      const Ints start = {0}, end = {1};
      float alone = 0.0F;
      Fp8MqaLogitsArgs args;
      args.q = batch.q.view().slice(0, row, 1);
      args.k = batch.k.view().slice(0, key, 1);
      args.k_scale = batch.k_scale.view().slice(0, key, 1);
      args.weights = batch.weights.view().slice(0, row, 1);
      args.ks = int_view(start);
      args.ke = int_view(end);
      args.logits = {&alone, DType::f32, {1, 1}};
      fp8_mqa_logits(args, nullptr, GetParam());
      EXPECT_TRUE(same_bits(&alone, &all[static_cast<std::size_t>(row * batch.keys + key)], 1))
          << heads << " heads, row " << row << " key " << key;
    }
  }
}

TEST_P(IndexerLogits, RangesAndWorkersDoNotChangeBits) {
  Rng rng(4);
  SCOPED_TRACE(rng.trace());
  IndexerBatch batch(rng, 80, 48, testing::scaled(1500, 300));
  const auto all = batch.logits(GetParam());
  for (std::size_t i = 0; i < batch.starts.size(); ++i) {
    batch.starts[i] = static_cast<std::int32_t>(rng.integer(0, batch.keys));
    batch.ends[i] = static_cast<std::int32_t>(rng.integer(batch.starts[i], batch.keys));
  }
  for (const int threads : {1, 2, 5}) {
    const auto pool = make_thread_pool(threads);
    const auto some = batch.logits(GetParam(), pool.get());
    for (std::int64_t i = 0; i < batch.rows; ++i) {
      const auto begin = batch.starts[static_cast<std::size_t>(i)];
      const auto end = batch.ends[static_cast<std::size_t>(i)];
      const std::int64_t at = i * batch.keys + begin;
      EXPECT_TRUE(same_bits(&some[static_cast<std::size_t>(at)], &all[static_cast<std::size_t>(at)],
                            end - begin))
          << "row " << i << ", " << threads << " threads";
    }
  }
}

TEST_P(IndexerLogits, ANanCodeMakesItsKeyOrItsRowNan) {
  Rng rng(5);
  const IndexerBatch batch(rng, 3, 20, 40);
  // Heads of weight 0 count, too, and the sign of the code does not.
  for (std::int64_t i = 0; i < 3; ++i)
    batch.weights.as<float>()[20 * static_cast<std::size_t>(i)] = 0.0F;
  batch.k.as<std::uint8_t>()[7 * 128 + 3] = 0x7F;
  batch.k.as<std::uint8_t>()[9 * 128 + 127] = 0xFF;
  batch.q.as<std::uint8_t>()[(2 * 20 + 19) * 128 + 64] = 0xFF;
  const auto out = batch.logits(GetParam());
  for (std::size_t i = 0; i < out.size(); ++i) {
    const bool is_nan = i / 40 == 2 || i % 40 == 7 || i % 40 == 9;
    EXPECT_EQ(std::bit_cast<std::uint32_t>(out[i]) == 0x7FC00000U, is_nan) << i;
    EXPECT_EQ(std::isnan(out[i]), is_nan) << i;
  }
  // Such keys are the last that are chosen.
  const Ints lens = {38, 40};
  Ints chosen(2 * 38);
  top_k_per_row_decode({ConstTensorView(out.data(), DType::f32, {2, 40}), int_view(lens), 1,
                        TensorView(chosen.data(), DType::i32, {2, 38})});
  EXPECT_THAT(chosen, ::testing::Contains(7).Times(1));
}

TEST_P(IndexerLogits, AgreeWithTheOracleForTheModelsSizes) {
  Rng rng(6);
  SCOPED_TRACE(rng.trace());
  const IndexerBatch batch(rng, testing::scaled(4, 1), 64, testing::scaled(900, 90));
  const auto out = batch.logits(GetParam());
  float unused = 0.0F;
  auto args = batch.args({&unused, DType::f32, {batch.rows, batch.keys}});
  const auto expected = oracle::fp8_mqa_logits(args);
  for (std::size_t i = 0; i < out.size(); ++i)
    EXPECT_NEAR(out[i], expected.logits[i], expected.bound[i]) << i;
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

TEST(Fp8MqaLogits, RefusesBadInputBeforeItWrites) {
  Rng rng(7);
  IndexerBatch batch(rng, 2, 3, 8);
  HostTensor logits(DType::f32, {2, 8});
  logits.fill_bytes(0x5A);
  const auto before = logits.snapshot();
  const auto error = [&](auto&& change) {
    auto args = batch.args(logits);
    change(args);
    const std::string text = error_of([&] { fp8_mqa_logits(args); });
    EXPECT_EQ(logits.snapshot(), before);
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.q.dtype = DType::u8; }), HasSubstr("[fp8_mqa_logits]"));
  EXPECT_THAT(error([](auto& a) { a.q.shape[2] = 64; }), HasSubstr("'q'"));
  EXPECT_THAT(error([](auto& a) { a.q.strides[2] = 2; }), HasSubstr("'q'"));
  EXPECT_THAT(error([](auto& a) { a.q.shape[1] = 0; }), HasSubstr("heads"));
  EXPECT_THAT(error([](auto& a) { a.k.dtype = DType::fp8_e5m2; }), HasSubstr("'k'"));
  EXPECT_THAT(error([](auto& a) { a.k.shape[1] = 132; }), HasSubstr("'k'"));
  EXPECT_THAT(error([](auto& a) { a.k_scale.shape[0] = 7; }), HasSubstr("'k_scale'"));
  EXPECT_THAT(error([](auto& a) { a.k_scale.strides[0] = 2; }), HasSubstr("'k_scale'"));
  EXPECT_THAT(error([](auto& a) { a.weights.shape[1] = 4; }), HasSubstr("'weights'"));
  EXPECT_THAT(error([](auto& a) { a.weights.dtype = DType::bf16; }), HasSubstr("'weights'"));
  EXPECT_THAT(error([](auto& a) { a.logits.shape[1] = 7; }), HasSubstr("'logits'"));
  EXPECT_THAT(error([](auto& a) { a.logits.shape[0] = 1; }), HasSubstr("'logits'"));
  EXPECT_THAT(error([](auto& a) { a.logits.strides[0] = 4; }), HasSubstr("'logits'"));
  EXPECT_THAT(error([&](auto& a) { a.logits.data = batch.weights.view().data; }),
              HasSubstr("'logits'"));
  EXPECT_THAT(error([](auto& a) { a.ks.shape[0] = 1; }), HasSubstr("'ks'"));
  EXPECT_THAT(error([](auto& a) { a.ke.dtype = DType::i64; }), HasSubstr("'ke'"));
  for (const std::int32_t start : {-1, 9, std::numeric_limits<std::int32_t>::min(),
                                   std::numeric_limits<std::int32_t>::max()}) {
    batch.starts[1] = start;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'ks'")) << start;
  }
  batch.starts[1] = 0;
  for (const std::int32_t end : {9, std::numeric_limits<std::int32_t>::max()}) {
    batch.ends[1] = end;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'ke'")) << end;
  }
}

}  // namespace
}  // namespace attend
