// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/indexer_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string>

#include "attend/core/error.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using ::testing::HasSubstr;
using testing::HostTensor;
using testing::Rng;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <typename T>
ConstTensorView ints(const std::vector<T>& v) {
  return {
      v.data(), sizeof(T) == 8 ? DType::i64 : DType::i32, {static_cast<std::int64_t>(v.size())}};
}

using Block = std::array<std::uint8_t, 3 * 132>;  // of three tokens

void set_scale(Block& block, std::size_t token, std::uint32_t bits) {
  std::memcpy(&block[384 + 4 * token], &bits, 4);
}

// Keys into slots 2, none and 0 of one block.
Block block_of(const HostTensor& k, IndexerScale format) {
  Block block;
  block.fill(0x5A);
  const std::vector<std::int64_t> slots = {2, -1, 0};
  indexer_k_quant_and_cache(
      {k, TensorView(block.data(), DType::u8, {1, 3, 132}), ints(slots), format});
  return block;
}

// Every byte, made by hand.
TEST(IndexerKQuantAndCache, WritesCodesAndThenScalesOfABlock) {
  HostTensor k(DType::f32, {3, 128});
  const auto x = k.as<float>();
  x[0] = 448.0F, x[1] = -448.0F, x[2] = 1.0F, x[3] = 1.0625F, x[4] = -0.0F, x[127] = 1.1875F;
  x[256] = -1.0F, x[257] = 0.5F, x[383] = 0.25F;
  Block expected;
  expected.fill(0x5A);
  std::fill_n(&expected[0], 128, 0), std::fill_n(&expected[256], 128, 0);
  expected[256] = 0x7E, expected[257] = 0xFE, expected[258] = 0x38, expected[259] = 0x38;
  expected[260] = 0x80, expected[383] = 0x3A;
  set_scale(expected, 2, 0x3F800000);  // 448 / 448
  Block rounded = expected;
  expected[0] = 0xFE, expected[1] = 0x76, expected[127] = 0x6E;
  set_scale(expected, 0, 0x3B124925);  // 1 / 448
  EXPECT_EQ(block_of(k, IndexerScale::unrounded), expected);
  // 2^-8: -256, 128 and 64.
  rounded[0] = 0xF8, rounded[1] = 0x70, rounded[127] = 0x68;
  set_scale(rounded, 0, 0x3B800000);
  EXPECT_EQ(block_of(k, IndexerScale::ue8m0), rounded);
}

TEST(IndexerKQuantAndCache, SmallKeysShareTheSmallestScale) {
  for (const float amax : {0.0F, 1e-30F, 1e-4F}) {
    HostTensor k(DType::f32, {3, 128});
    k.as<float>()[5] = amax;
    const Block block = block_of(k, IndexerScale::unrounded);
    const float scale = 1e-4F / 448.0F;
    EXPECT_EQ(std::memcmp(&block[384 + 8], &scale, 4), 0);
    EXPECT_EQ(block[256 + 5], amax == 1e-4F ? 0x7E : 0) << amax;
    EXPECT_EQ(block[256 + 6], 0);
    const Block rounded = block_of(k, IndexerScale::ue8m0);
    const float power = 0x1p-22F;
    EXPECT_EQ(std::memcmp(&rounded[384 + 8], &power, 4), 0);
  }
}

TEST(IndexerKQuantAndCache, WhatIsNotFiniteLeavesTheOthersAlone) {
  HostTensor k(DType::f32, {3, 128});
  const auto x = k.as<float>();
  x[0] = kInf, x[1] = -kInf, x[2] = kNan, x[3] = -kNan, x[4] = 448.0F, x[5] = 1.0F;
  std::fill_n(x.begin() + 256, 128, kInf);
  for (const IndexerScale format : {IndexerScale::unrounded, IndexerScale::ue8m0}) {
    const Block block = block_of(k, format);
    const std::array<std::uint8_t, 6> codes = {0x7F, 0xFF, 0x7F, 0xFF, 0x7E, 0x38};
    EXPECT_TRUE(std::equal(codes.begin(), codes.end(), &block[256]));
    EXPECT_TRUE(std::all_of(&block[0], &block[128], [](auto c) { return c == 0x7F; }));
    float scales[3];
    std::memcpy(scales, &block[384], 12);
    EXPECT_EQ(scales[2], 1.0F);
    EXPECT_EQ(scales[0], format == IndexerScale::ue8m0 ? 0x1p-22F : 1e-4F / 448.0F);
  }
}

TEST(IndexerKQuantAndCache, WorkersAgreeAndTheLaterRowWins) {
  Rng rng(3);
  HostTensor k(DType::bf16, {2000, 128});
  k.fill_normal(rng);
  std::vector<std::int64_t> slots(2000);
  for (auto& s : slots) s = static_cast<std::int64_t>(rng.next() % 640);
  HostTensor serial(DType::u8, {10, 64, 132});
  for (std::int64_t t = 0; t < 2000; ++t)
    indexer_k_quant_and_cache(
        {k.view().slice(0, t, 1), serial,
         ConstTensorView(&slots[static_cast<std::size_t>(t)], DType::i64, {1})});
  for (const int threads : {1, 2, 5}) {
    const auto pool = make_thread_pool(threads);
    HostTensor cache(DType::u8, {10, 64, 132});
    indexer_k_quant_and_cache({k, cache, ints(slots)}, pool.get());
    EXPECT_EQ(cache.snapshot(), serial.snapshot()) << threads << " threads";
  }
}

TEST(CpGatherIndexerKQuantCache, GivesBackWhatWasWritten) {
  // Three blocks of two tokens, 300 bytes apart; codes and scales tell block and offset.
  std::vector<std::uint8_t> bytes(2 * 300 + 264, 0xFF);
  for (std::size_t b = 0; b < 3; ++b) {
    for (std::size_t i = 0; i < 2; ++i) {
      std::fill_n(&bytes[300 * b + 128 * i], 128, static_cast<std::uint8_t>(16 * b + i));
      const auto scale = static_cast<float>(10 * b + i);
      std::memcpy(&bytes[300 * b + 256 + 4 * i], &scale, 4);
    }
  }
  ConstTensorView cache(bytes.data(), DType::u8, {3, 2, 132});
  cache.strides[0] = 300;
  HostTensor wide(DType::fp8_e4m3, {6, 130}), scales(DType::f32, {6});
  wide.fill_bytes(0x5A), scales.fill_bytes(0x5A);
  const std::vector<std::int32_t> table = {2, 0, -7, 9, 1, 1 << 30}, cu = {0, 3, 3, 5};
  cp_gather_indexer_k_quant_cache({cache, wide.view().slice(1, 0, 128), scales,
                                   ConstTensorView(table.data(), DType::i32, {3, 2}), ints(cu)});
  const std::array<int, 6> rows = {0x20, 0x21, 0x00, 0x10, 0x11, 0x5A};
  for (std::size_t row = 0; row < 6; ++row) {
    const auto* got = wide.view().as<std::uint8_t>() + 130 * row;
    EXPECT_TRUE(std::all_of(got, got + 128, [&](auto c) { return c == rows[row]; })) << row;
    EXPECT_TRUE(got[128] == 0x5A && got[129] == 0x5A);
    if (row == 5) continue;
    EXPECT_EQ(scales.as<float>()[row], 10 * (rows[row] >> 4) + (rows[row] & 1));
  }
  std::uint32_t last;
  std::memcpy(&last, &scales.as<float>()[5], 4);
  EXPECT_EQ(last, 0x5A5A5A5AU);
}

TEST(CpGatherIndexerKQuantCache, WorkersMayStartWithinABlock) {
  Rng rng(4);
  HostTensor k(DType::f32, {2500, 128}), cache(DType::u8, {40, 64, 132});
  k.fill_normal(rng);
  std::vector<std::int64_t> slots(2500);
  for (std::size_t t = 0; t < slots.size(); ++t) slots[t] = static_cast<std::int64_t>(t);
  indexer_k_quant_and_cache({k, cache, ints(slots)});
  std::vector<std::int32_t> table(40);
  for (std::size_t b = 0; b < table.size(); ++b) table[b] = static_cast<std::int32_t>(b);
  const std::vector<std::int32_t> cu = {0, 2500};
  const auto gather = [&](int threads) {
    const auto pool = make_thread_pool(threads);
    HostTensor codes(DType::fp8_e4m3, {2500, 128}), scales(DType::f32, {2500});
    cp_gather_indexer_k_quant_cache(
        {cache, codes, scales, ConstTensorView(table.data(), DType::i32, {1, 40}), ints(cu)},
        pool.get());
    return std::pair(codes.snapshot(), scales.snapshot());
  };
  const auto one = gather(1);
  for (const int threads : {2, 3, 7}) EXPECT_EQ(gather(threads), one) << threads << " threads";
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

TEST(IndexerKQuantAndCache, RefusesBadInputBeforeItWrites) {
  HostTensor k(DType::bf16, {2, 128}), cache(DType::u8, {2, 4, 132});
  cache.fill_bytes(0x5A);
  const auto before = cache.snapshot();
  std::vector<std::int64_t> slots = {1, 2};
  const auto error = [&](auto&& change) {
    IndexerKQuantAndCacheArgs a{k, cache, ints(slots)};
    change(a);
    const std::string text = error_of([&] { indexer_k_quant_and_cache(a); });
    EXPECT_EQ(cache.snapshot(), before);
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.k.shape[1] = 64; }), HasSubstr("'k'"));
  EXPECT_THAT(error([](auto& a) { a.k.dtype = DType::i32; }), HasSubstr("'k'"));
  EXPECT_THAT(error([](auto& a) { a.kv_cache.shape[2] = 128; }), HasSubstr("132"));
  EXPECT_THAT(error([](auto& a) { a.kv_cache.strides[1] = 140; }), HasSubstr("without gaps"));
  EXPECT_THAT(error([](auto& a) { a.kv_cache.strides[0] = 132; }), HasSubstr("'kv_cache'"));
  EXPECT_THAT(error([](auto& a) { a.scale_fmt = static_cast<IndexerScale>(7); }),
              HasSubstr("'scale_fmt'"));
  EXPECT_THAT(error([&](auto& a) { a.k.data = cache.view().data; }), HasSubstr("'kv_cache'"));
  for (const std::int64_t slot : {std::int64_t{8}, std::numeric_limits<std::int64_t>::max()}) {
    slots[1] = slot;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'slot_mapping'"));
  }
}

TEST(CpGatherIndexerKQuantCache, RefusesBadInputBeforeItWrites) {
  HostTensor cache(DType::u8, {2, 4, 132}), dst(DType::fp8_e4m3, {6, 128}), scales(DType::f32, {6});
  dst.fill_bytes(0x5A), scales.fill_bytes(0x5A);
  const auto before = dst.snapshot(), scales_before = scales.snapshot();
  std::vector<std::int32_t> table = {1, 0}, cu = {0, 6};
  const auto error = [&](auto&& change) {
    CpGatherIndexerKQuantCacheArgs a{cache, dst, scales,
                                     ConstTensorView(table.data(), DType::i32, {1, 2}), ints(cu)};
    change(a);
    const std::string text = error_of([&] { cp_gather_indexer_k_quant_cache(a); });
    EXPECT_EQ(dst.snapshot(), before);
    EXPECT_EQ(scales.snapshot(), scales_before);
    return text;
  };
  EXPECT_THAT(error([](auto& a) { a.kv_cache.dtype = DType::i8; }), HasSubstr("'kv_cache'"));
  EXPECT_THAT(error([](auto& a) { a.dst_k.dtype = DType::u8; }), HasSubstr("'dst_k'"));
  EXPECT_THAT(error([](auto& a) { a.dst_scale.shape[0] = 5; }), HasSubstr("'dst_scale'"));
  EXPECT_THAT(error([&](auto& a) { a.dst_scale.data = dst.view().data; }), HasSubstr("'dst_k'"));
  EXPECT_THAT(error([](auto& a) { a.block_table.shape[1] = 1; }), HasSubstr("'block_table'"));
  for (const std::int32_t block : {-1, 2, std::numeric_limits<std::int32_t>::min()}) {
    table[1] = block;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'block_table'"));
  }
  table[1] = 0;
  for (const auto& bad : {std::vector<std::int32_t>{0, 7}, {1, 6}, {0, -1}}) {
    cu = bad;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'cu_seq_lens'"));
  }
}

}  // namespace
}  // namespace attend
