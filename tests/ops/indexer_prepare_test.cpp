// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/indexer.h"
#include "attend/ops/top_k.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::HostTensor;
using testing::Rng;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Projections of some tokens, all zero, with tables of 4 positions that turn by quarters.
struct Layer {
  Layer(DType dtype, std::int64_t tokens, std::int64_t heads)
      : q(dtype, {tokens, heads, 128}),
        k(dtype, {tokens, 128}),
        weights(DType::f32, {tokens, heads}),
        tables(DType::f32, {4, 64}),
        norm_weight(DType::f32, {128}),
        norm_bias(DType::f32, {128}),
        positions(static_cast<std::size_t>(tokens)),
        codes(DType::fp8_e4m3, {tokens, heads, 128}),
        weights_out(DType::f32, {tokens, heads}),
        k_out(dtype, {tokens, 128}) {
    constexpr float kCos[] = {1, 0, -1, 0};
    for (std::size_t p = 0; p < 4; ++p) {
      std::fill_n(&tables.as<float>()[64 * p], 32, kCos[p]);
      std::fill_n(&tables.as<float>()[64 * p + 32], 32, kCos[(p + 3) % 4]);
    }
    for (float& x : norm_weight.as<float>()) x = 1.0F;
    for (float& x : weights.as<float>()) x = 1.0F;
  }
  PrepareIndexerArgs args() const {
    PrepareIndexerArgs a;
    a.q = q;
    a.k = k;
    a.weights = weights;
    a.positions = {positions.data(), DType::i64, {static_cast<std::int64_t>(positions.size())}};
    a.cos_sin_cache = tables;
    a.k_norm_weight = norm_weight;
    a.k_norm_bias = norm_bias;
    a.q_codes = codes;
    a.weights_out = weights_out;
    a.k_out = k_out;
    return a;
  }
  float code(std::size_t at) const { return to_f32(codes.as<fp8_e4m3>()[at]); }

  HostTensor q, k, weights, tables, norm_weight, norm_bias;
  std::vector<std::int64_t> positions;
  HostTensor codes, weights_out, k_out;
};

TEST(PrepareIndexer, ScalesOfQueriesGoIntoTheWeights) {
  Layer l(DType::f32, 1, 4);
  l.q.as<float>()[100] = 448.0F;         // scale 1
  l.q.as<float>()[128 + 100] = -449.0F;  // 2
  l.q.as<float>()[256 + 100] = 7.0F;     // 2^-6
  l.weights.as<float>()[1] = -3.0F;
  prepare_indexer(l.args());
  EXPECT_EQ(l.code(100), 448.0F);
  EXPECT_EQ(l.code(228), -224.0F);
  EXPECT_EQ(l.code(356), 448.0F);
  const float base = static_cast<float>(1.0 / std::sqrt(128.0)) * 0.5F;  // of 4 heads
  const auto w = l.weights_out.as<float>();
  // The last head is all zero: its scale is that of 1e-10.
  EXPECT_THAT(std::vector<float>(w.begin(), w.end()),
              ElementsAre(base, -6 * base, 0x1p-6F * base, 0x1p-42F * base));
  auto args = l.args();
  args.q_scale_fmt = IndexerScale::unrounded;
  args.softmax_scale = 2.0F;
  prepare_indexer(args);
  EXPECT_EQ(l.code(228), -448.0F);
  EXPECT_EQ(w[1], -3.0F * (449.0F / 448.0F) * 2.0F * 0.5F);
}

TEST(PrepareIndexer, TheFirst64ElementsAreRotated) {
  for (const bool neox : {true, false}) {
    Layer l(DType::bf16, 2, 1);
    l.positions = {0, 1};  // a quarter turn: the pair (x, y) becomes (-y, x)
    for (std::size_t t = 0; t < 2; ++t) {
      const auto set = [&](std::size_t i, float x) { l.q.as<bf16>()[128 * t + i] = to_bf16(x); };
      set(0, 448.0F), set(1, 64.0F), set(32, 32.0F), set(64, 16.0F), set(96, 8.0F);
    }
    auto args = l.args();
    args.is_neox = neox;
    prepare_indexer(args);
    const auto row = [&](std::size_t t) {
      std::vector<float> found;
      for (const std::size_t i : {0, 1, 32, 33, 64, 96}) found.push_back(l.code(128 * t + i));
      return found;
    };
    EXPECT_THAT(row(0), ElementsAre(448, 64, 32, 0, 16, 8));
    if (neox) {
      EXPECT_THAT(row(1), ElementsAre(-32, 0, 448, 64, 16, 8));
    } else {
      EXPECT_THAT(row(1), ElementsAre(-64, 448, 0, 32, 16, 8));
    }
  }
}

TEST(PrepareIndexer, KeysAreNormalisedThenRotated) {
  Layer l(DType::f32, 2, 1);
  l.positions = {0, 2};  // half a turn: the first 64 change their sign
  for (std::size_t i = 0; i < 128; ++i) {
    l.k.as<float>()[i] = l.k.as<float>()[128 + i] = 1e6F + (i % 2 == 0 ? 3.0F : -3.0F);
    l.norm_weight.as<float>()[i] = 2.0F;
    l.norm_bias.as<float>()[i] = 0.25F;
  }
  prepare_indexer(l.args());
  const auto out = l.k_out.as<float>();
  for (std::size_t i = 0; i < 128; ++i) {
    const float expected = i % 2 == 0 ? 2.25F : -1.75F;
    EXPECT_NEAR(out[i], expected, 1e-6F) << i;
    EXPECT_EQ(out[128 + i], i < 64 ? -out[i] : out[i]) << i;
  }
  // All the same: nothing is left but the bias.
  for (float& x : l.k.as<float>()) x = 5.0F;
  prepare_indexer(l.args());
  EXPECT_EQ(out[3], 0.25F);
}

TEST(PrepareIndexer, TheHadamardTransformIsOrthonormalAndKeepsProducts) {
  Rng rng(1);
  Layer l(DType::f32, 1, 1);
  l.q.fill_normal(rng);
  l.k.fill_normal(rng);
  auto args = l.args();
  prepare_indexer(args);
  const auto plain = l.k_out.snapshot();
  args.hadamard = true;
  prepare_indexer(args);
  std::vector<float> before(128);
  std::memcpy(before.data(), plain.data(), plain.size());
  const auto after = l.k_out.as<float>();
  double size_before = 0.0, size_after = 0.0, first = 0.0, last = 0.0;
  for (std::size_t i = 0; i < 128; ++i) {
    size_before += double{before[i]} * before[i];
    size_after += double{after[i]} * after[i];
    first += before[i];
    last += (__builtin_popcount(static_cast<unsigned>(i)) % 2 == 0 ? 1.0 : -1.0) * before[i];
  }
  EXPECT_NEAR(size_after, size_before, 1e-4);
  EXPECT_NEAR(after[0], first / std::sqrt(128.0), 1e-5);
  EXPECT_NEAR(after[127], last / std::sqrt(128.0), 1e-5);
}

TEST(PrepareIndexer, WorkersAgreeAndKeysMayBeWrittenInPlace) {
  Rng rng(2);
  Layer l(DType::bf16, 40, 64);
  l.q.fill_normal(rng);
  l.k.fill_normal(rng);
  l.weights.fill_normal(rng);
  for (auto& p : l.positions) p = rng.integer(0, 3);
  auto args = l.args();
  const auto one = make_thread_pool(1), three = make_thread_pool(3);
  prepare_indexer(args, one.get());
  const auto codes = l.codes.snapshot(), weights = l.weights_out.snapshot(),
             keys = l.k_out.snapshot();
  args.k_out = l.k;
  prepare_indexer(args, three.get());
  EXPECT_EQ(l.codes.snapshot(), codes);
  EXPECT_EQ(l.weights_out.snapshot(), weights);
  EXPECT_EQ(l.k.snapshot(), keys);
}

TEST(PrepareIndexer, WhatIsNotFiniteStaysInItsRow) {
  Layer l(DType::f32, 2, 2);
  l.q.as<float>()[70] = kNan;
  l.q.as<float>()[71] = -std::numeric_limits<float>::infinity();
  l.q.as<float>()[72] = 448.0F;
  l.q.as<float>()[128 + 72] = 1.0F;
  l.k.as<float>()[5] = kNan;
  prepare_indexer(l.args());
  const auto codes = l.codes.as<std::uint8_t>();
  EXPECT_EQ(codes[70], 0x7F);
  EXPECT_EQ(codes[71], 0xFF);
  EXPECT_EQ(l.code(72), 448.0F);
  EXPECT_EQ(l.code(200), 256.0F);  // 2^-8
  EXPECT_TRUE(std::isnan(l.k_out.as<float>()[127]));
  EXPECT_EQ(l.k_out.as<float>()[128], 0.0F);
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

TEST(PrepareIndexer, RefusesBadInputBeforeItWrites) {
  Layer l(DType::bf16, 3, 2);
  l.codes.fill_bytes(0x5A), l.weights_out.fill_bytes(0x5A), l.k_out.fill_bytes(0x5A);
  const auto codes = l.codes.snapshot(), weights = l.weights_out.snapshot(),
             keys = l.k_out.snapshot();
  const auto error = [&](auto&& change) {
    auto args = l.args();
    change(args);
    const std::string text = error_of([&] { prepare_indexer(args); });
    EXPECT_EQ(l.codes.snapshot(), codes);
    EXPECT_EQ(l.weights_out.snapshot(), weights);
    EXPECT_EQ(l.k_out.snapshot(), keys);
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.q.shape[2] = 64; }), HasSubstr("[prepare_indexer]"));
  EXPECT_THAT(error([](auto& a) { a.q.dtype = DType::fp8_e4m3; }), HasSubstr("'q'"));
  EXPECT_THAT(error([](auto& a) { a.q.shape[0] = 2; }), HasSubstr("'q'"));
  EXPECT_THAT(error([](auto& a) { a.k.dtype = DType::f16; }), HasSubstr("'k'"));
  EXPECT_THAT(error([](auto& a) { a.k.shape[0] = 2; }), HasSubstr("'k'"));
  EXPECT_THAT(error([](auto& a) { a.weights.shape[1] = 1; }), HasSubstr("'weights'"));
  EXPECT_THAT(error([](auto& a) { a.cos_sin_cache.shape[1] = 128; }), HasSubstr("'cos_sin_cache'"));
  EXPECT_THAT(error([](auto& a) { a.k_norm_weight.dtype = DType::bf16; }),
              HasSubstr("'k_norm_weight'"));
  EXPECT_THAT(error([](auto& a) { a.k_norm_bias.shape[0] = 64; }), HasSubstr("'k_norm_bias'"));
  for (const float eps : {0.0F, -1.0F, kNan})
    EXPECT_THAT(error([&](auto& a) { a.k_norm_eps = eps; }), HasSubstr("'k_norm_eps'"));
  EXPECT_THAT(error([](auto& a) { a.softmax_scale = kNan; }), HasSubstr("'softmax_scale'"));
  EXPECT_THAT(error([](auto& a) { a.q_scale_fmt = static_cast<IndexerScale>(9); }),
              HasSubstr("'q_scale_fmt'"));
  EXPECT_THAT(error([](auto& a) { a.q_codes.dtype = DType::u8; }), HasSubstr("'q_codes'"));
  EXPECT_THAT(error([](auto& a) { a.q_codes.shape[0] = 2; }), HasSubstr("'q_codes'"));
  EXPECT_THAT(error([](auto& a) { a.q_codes.strides[0] = 128; }), HasSubstr("'q_codes'"));
  EXPECT_THAT(error([](auto& a) { a.weights_out.shape[1] = 3; }), HasSubstr("'weights_out'"));
  EXPECT_THAT(error([&](auto& a) { a.weights_out.data = l.weights.view().data; }),
              HasSubstr("'weights_out'"));
  EXPECT_THAT(error([](auto& a) { a.k_out.dtype = DType::f32; }), HasSubstr("'k_out'"));
  EXPECT_THAT(error([&](auto& a) { a.k_out.data = l.q.view().data; }), HasSubstr("'k_out'"));
  for (const std::int64_t position :
       {std::int64_t{-1}, std::int64_t{4}, std::numeric_limits<std::int64_t>::min(),
        std::numeric_limits<std::int64_t>::max()}) {
    l.positions[1] = position;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'positions'"));
  }
}

TEST(IndexerShortRows, AreWhatTheTopKOfAnyLogitsIs) {
  Rng rng(3);
  const std::vector<std::int32_t> lengths = {0, 1, 4, 5, -7, 100};
  HostTensor logits(DType::f32, {6, 100});
  logits.fill_normal(rng);
  logits.as<float>()[201] = kNan;
  std::vector<std::int32_t> chosen(6 * 4), out(6 * 4, 77);
  const ConstTensorView given(lengths.data(), DType::i32, {6});
  EXPECT_EQ(indexer_short_rows({given, TensorView(out.data(), DType::i32, {6, 4})}), 2);
  const std::vector<std::int32_t> starts(6), ends = {0, 1, 4, 5, 0, 100};
  top_k_per_row_prefill({logits, ConstTensorView(starts.data(), DType::i32, {6}),
                         ConstTensorView(ends.data(), DType::i32, {6}),
                         TensorView(chosen.data(), DType::i32, {6, 4})});
  for (std::size_t i = 0; i < out.size(); ++i) {
    const bool is_short = lengths[i / 4] <= 4;
    EXPECT_EQ(out[i], is_short ? chosen[i] : 77) << i;
  }
}

TEST(IndexerShortRows, RefusesBadInputBeforeItWrites) {
  const std::vector<std::int32_t> lengths = {1, 2};
  std::vector<std::int32_t> out(6, 77);
  const auto error = [&](auto&& change) {
    IndexerShortRowsArgs args{ConstTensorView(lengths.data(), DType::i32, {2}),
                              TensorView(out.data(), DType::i32, {2, 3})};
    change(args);
    const std::string text = error_of([&] { indexer_short_rows(args); });
    EXPECT_THAT(out, ::testing::Each(77));
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.lengths.shape[0] = 1; }), HasSubstr("'lengths'"));
  EXPECT_THAT(error([](auto& a) { a.lengths.dtype = DType::i64; }), HasSubstr("'lengths'"));
  EXPECT_THAT(error([](auto& a) { a.out.shape[1] = 0; }), HasSubstr("'out'"));
  EXPECT_THAT(error([](auto& a) { a.out.strides[0] = 1; }), HasSubstr("'out'"));
}

}  // namespace
}  // namespace attend
