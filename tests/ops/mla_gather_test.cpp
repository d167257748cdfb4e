// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/ops/mla_cache.h"
#include "attend/oracle/quantize.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

constexpr float kInf = std::numeric_limits<float>::infinity();

ConstTensorView i32(const std::vector<std::int32_t>& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}

// A row of the format: codes by position, four scales, rope bits by position; zero elsewhere.
struct DsRow {
  std::array<std::uint8_t, fp8_ds_mla::kRowBytes> bytes{};

  DsRow& code(std::size_t at, int c) {
    bytes[at] = static_cast<std::uint8_t>(c);
    return *this;
  }
  DsRow& scale(std::size_t tile, float s) {
    std::memcpy(&bytes[512 + 4 * tile], &s, 4);
    return *this;
  }
  DsRow& rope(std::size_t at, std::uint16_t bits) {
    std::memcpy(&bytes[528 + 2 * at], &bits, 2);
    return *this;
  }
  // What the op makes of it.
  std::vector<std::uint16_t> read() const {
    std::vector<std::uint16_t> dst(fp8_ds_mla::kDim);
    const std::vector<std::int32_t> table = {0}, starts = {0};
    cp_gather_and_upconvert_fp8_kv_cache({ConstTensorView(bytes.data(), DType::u8, {1, 1, 656}),
                                          TensorView(dst.data(), DType::bf16, {1, 576}),
                                          ConstTensorView(table.data(), DType::i32, {1, 1}),
                                          i32(starts)});
    return dst;
  }
};

TEST(Fp8DsMlaRows, UnroundedScalesAreReadAsTheyAre) {
  DsRow row;
  row.scale(0, 1.0F / 448.0F).code(0, 0x7E).code(1, 0xF6).code(2, 0x80);
  row.scale(1, 1.01F).code(128, 0x38).code(129, 0x39);
  // 1 + 2^-8 and 1 + 3 * 2^-8 lie between two bf16 numbers: the even one.
  row.scale(2, 0x1.01p0F).code(256, 0x38).code(257, 0xB8);
  row.scale(3, 0x1.03p0F).code(511, 0x38);
  row.rope(0, 0x7F81).rope(63, 0x8001);
  const auto got = row.read();
  EXPECT_EQ(got[0], 0x3F80);  // 448 / 448
  EXPECT_EQ(got[1], 0xBF00);  // -224 / 448
  EXPECT_EQ(got[2], 0x8000);
  EXPECT_EQ(got[128], 0x3F81);
  EXPECT_EQ(got[129], 0x3F91);  // 1.125 * 1.01
  EXPECT_EQ(got[256], 0x3F80);
  EXPECT_EQ(got[257], 0xBF80);
  EXPECT_EQ(got[511], 0x3F82);
  EXPECT_EQ(got[512], 0x7F81) << "a signalling NaN keeps its bits";
  EXPECT_EQ(got[575], 0x8001);
}

TEST(Fp8DsMlaRows, ScalesThatArePowersOfTwoAreReadToo) {
  DsRow row;
  row.scale(0, 0x1p-9F).code(0, 0x7E).code(1, 0x39).code(127, 0x01);
  row.scale(1, 0x1p10F).code(128, 0xFE);
  row.scale(2, 0x1p-126F).code(256, 0x38).code(257, 0x30);
  row.scale(3, 1.0F).code(384, 0x08);
  const auto got = row.read();
  EXPECT_EQ(got[0], 0x3F60);    // 448 / 512
  EXPECT_EQ(got[1], 0x3B10);    // 1.125 / 512
  EXPECT_EQ(got[127], 0x3680);  // 2^-18
  EXPECT_EQ(got[128], 0xC8E0);  // -448 * 1024
  EXPECT_EQ(got[256], 0x0080);
  EXPECT_EQ(got[257], 0x0040);  // below the smallest normal number
  EXPECT_EQ(got[384], 0x3C80);  // 2^-6
}

TEST(Fp8DsMlaRows, WhatIsNoNumberIsTheOneNan) {
  DsRow row;
  row.scale(0, 1.0F).code(0, 0x7F).code(1, 0xFF);
  row.scale(1, kInf).code(128, 0x00).code(129, 0xB8);
  row.scale(2, -std::numeric_limits<float>::quiet_NaN()).code(256, 0x38).code(257, 0xFF);
  row.scale(3, 3e38F).code(384, 0x7E);
  const auto got = row.read();
  for (const std::size_t i : {0, 1, 128, 256, 257}) EXPECT_EQ(got[i], 0x7FC0) << i;
  EXPECT_EQ(got[129], 0xFF80);
  EXPECT_EQ(got[384], 0x7F80);
}

// Every code with scales of every kind, against the oracle.
TEST(Fp8DsMlaRows, EveryCodeIsWhatTheOracleSays) {
  for (const float scale : {1.0F, 0x1p-20F, 1.0F / 448.0F, 0.123F, 3e36F, 1e-40F, 0.0F, -2.5F}) {
    DsRow row;
    for (std::size_t i = 0; i < 512; ++i) row.code(i, static_cast<int>(i % 256));
    for (std::size_t t = 0; t < 4; ++t) row.scale(t, scale);
    std::array<double, 576> expected;
    oracle::fp8_ds_mla_decode(row.bytes, expected);
    const auto got = row.read();
    for (std::size_t i = 0; i < 512; ++i) {
      const auto want = to_bf16(static_cast<float>(expected[i]));
      ASSERT_EQ(got[i], want.bits) << "code " << i % 256 << " scale " << scale;
    }
  }
}

// A cache of three requests in which only what they use is no NaN.
struct Problem {
  static constexpr std::int64_t kBlocks = 24, kBlockSize = 16;
  HostTensor cache;
  std::vector<std::int32_t> table = {7, 3, 20, 11, 2, -1, 0, 18, 5, 23, 9, 1};  // [3, 4]
  std::vector<std::int32_t> starts = {5, 16, 31}, cu = {0, 40, 40, 60};
  float scale = 0.37F;

  Problem(DType stored, std::int64_t dim, Rng& rng) : cache(stored, {kBlocks, kBlockSize, dim}) {
    cache.fill_bytes(0xFF);
    for (const int block : {7, 3, 20, 23, 9, 1}) {
      const TensorView rows = cache.view().select(0, block);
      for (std::int64_t i = 0; i < kBlockSize; ++i) fill(rows.select(0, i), rng);
    }
  }
  static void fill(const TensorView& row, Rng& rng) {
    if (row.dtype != DType::u8) {
      for (std::size_t i = 0; i < static_cast<std::size_t>(row.numel()) * size_of(row.dtype); ++i)
        row.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(rng.next());
      return;
    }
    std::vector<double> latent(512);
    std::vector<std::uint16_t> rope(64);
    for (double& x : latent) x = to_f32(to_bf16(rng.normal()));
    for (std::uint16_t& x : rope) x = static_cast<std::uint16_t>(rng.next());
    oracle::fp8_ds_mla_encode(latent, rope, {row.as<std::uint8_t>(), 656});
  }
  ConstTensorView table_view() const { return {table.data(), DType::i32, {3, 4}}; }
  GatherAndMaybeDequantCacheArgs gather(const TensorView& dst) const {
    return {cache,   dst,         table_view(),
            i32(cu), i32(starts), ConstTensorView(&scale, DType::f32, {1})};
  }
  // The cache's row for row `row` of dst.
  ConstTensorView row_of(std::int64_t row) const {
    const std::size_t r = row < 40 ? 0 : 2;
    const std::int64_t token = starts[r] + row - cu[r];
    const std::int32_t block = table[r * 4 + static_cast<std::size_t>(token / kBlockSize)];
    return ConstTensorView(cache).select(0, block).select(0, token % kBlockSize);
  }
};

TEST(GatherMlaCache, RowsFromTheMiddleOfABlockAreCopiedBitForBit) {
  Rng rng(4);
  SCOPED_TRACE(rng.trace());
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Problem p(dtype, 320, rng);
    HostTensor wide(dtype, {62, 328});
    wide.fill_bytes(0x5A);
    gather_and_maybe_dequant_cache(p.gather(wide.view().slice(1, 0, 320)));
    HostTensor raw(dtype, {60, 320});
    cp_gather_cache({p.cache, raw, p.table_view(), i32(p.cu), i32(p.starts)});
    const std::size_t bytes = 320 * size_of(dtype), step = 328 * size_of(dtype);
    const auto got = wide.snapshot(), got_raw = raw.snapshot();
    for (std::int64_t row = 0; row < 62; ++row) {
      const unsigned char* to = &got[static_cast<std::size_t>(row) * step];
      const auto untouched = [](unsigned char b) { return b == 0x5A; };
      EXPECT_TRUE(std::all_of(to + bytes, to + step, untouched)) << row;
      if (row >= 60) {
        EXPECT_TRUE(std::all_of(to, to + bytes, untouched)) << row;
        continue;
      }
      EXPECT_EQ(std::memcmp(to, p.row_of(row).data, bytes), 0) << row;
      EXPECT_EQ(
          std::memcmp(&got_raw[static_cast<std::size_t>(row) * bytes], p.row_of(row).data, bytes),
          0)
          << row;
    }
  }
}

TEST(GatherMlaCache, CodesBecomeTheNearestNumbers) {
  Rng rng(5);
  SCOPED_TRACE(rng.trace());
  for (const DType stored : {DType::fp8_e4m3, DType::fp8_e5m2}) {
    Problem p(stored, 72, rng);
    HostTensor f32(DType::f32, {60, 72}), f16_(DType::f16, {60, 72}), bf16_(DType::bf16, {60, 72});
    for (const HostTensor* dst : {&f32, &f16_, &bf16_})
      gather_and_maybe_dequant_cache(p.gather(*dst));
    for (std::int64_t row = 0; row < 60; ++row) {
      for (std::int64_t d = 0; d < 72; ++d) {
        const double value = oracle::fp8_value(stored, p.row_of(row).as<std::uint8_t>()[d]);
        const auto want = std::isnan(value)
                              ? std::numeric_limits<float>::quiet_NaN()
                              : static_cast<float>(value * static_cast<double>(p.scale));
        const auto i = static_cast<std::size_t>(72 * row + d);
        ASSERT_EQ(std::bit_cast<std::uint32_t>(f32.as<float>()[i]),
                  std::bit_cast<std::uint32_t>(want));
        ASSERT_EQ(f16_.as<f16>()[i].bits, to_f16(want).bits);
        ASSERT_EQ(bf16_.as<bf16>()[i].bits, to_bf16(want).bits);
      }
    }
  }
}

TEST(GatherMlaCache, DsRowsAreTheSameNumbersInEveryType) {
  Rng rng(6);
  SCOPED_TRACE(rng.trace());
  Problem p(DType::u8, 656, rng);
  HostTensor f32(DType::f32, {60, 576}), f16_(DType::f16, {60, 576}), bf16_(DType::bf16, {60, 576});
  for (const HostTensor* dst : {&f32, &f16_, &bf16_})
    gather_and_maybe_dequant_cache(p.gather(*dst));
  for (std::int64_t row = 0; row < 60; ++row) {
    std::array<double, 576> elements;
    oracle::fp8_ds_mla_decode({p.row_of(row).as<std::uint8_t>(), 656}, elements);
    for (std::size_t d = 0; d < 576; ++d) {
      const auto i = static_cast<std::size_t>(576 * row) + d;
      const auto want = static_cast<float>(elements[d]);
      if (std::isnan(want)) continue;  // of the rope part; copied as far as the type allows
      ASSERT_EQ(f32.as<float>()[i], want);
      ASSERT_EQ(f16_.as<f16>()[i].bits, to_f16(want).bits);
      ASSERT_EQ(bf16_.as<bf16>()[i].bits, to_bf16(want).bits);
    }
  }
  // The other op gives the same rows to requests that start at token 0.
  p.starts = {0, 0, 0};
  p.table = {7, 3, 20, 11, 2, -1, 0, 18, 23, 9, 1, 5};
  HostTensor up(DType::bf16, {60, 576}), all(DType::bf16, {60, 576});
  gather_and_maybe_dequant_cache(p.gather(all));
  const std::vector<std::int32_t> workspace_starts = {0, 40, 40};
  cp_gather_and_upconvert_fp8_kv_cache({p.cache, up, p.table_view(), i32(workspace_starts)});
  EXPECT_EQ(up.snapshot(), all.snapshot());
}

TEST(GatherMlaCache, SameBitsWhateverTheChunksAndThreads) {
  Rng rng(7);
  SCOPED_TRACE(rng.trace());
  for (const DType stored : {DType::u8, DType::fp8_e4m3, DType::bf16}) {
    constexpr std::int64_t kTokens = 600;
    const std::int64_t dim = stored == DType::u8 ? 656 : 576;
    HostTensor cache(stored, {80, 16, dim});
    std::vector<std::int32_t> table;
    for (int b = 0; b < 76; ++b) table.push_back((b * 37) % 80);
    for (std::int64_t b = 0; b < 80; ++b)
      for (std::int64_t i = 0; i < 16; ++i)
        Problem::fill(cache.view().select(0, b).select(0, i), rng);
    const float scale = 0.01F;
    const auto gather = [&](std::vector<std::int32_t> starts, std::vector<std::int32_t> cu,
                            const TensorView& dst, int threads) {
      const auto pool = make_thread_pool(threads);
      gather_and_maybe_dequant_cache(
          {cache, dst, ConstTensorView(table.data(), DType::i32, {2, 38}), i32(cu), i32(starts),
           ConstTensorView(&scale, DType::f32, {1})},
          pool.get());
    };
    HostTensor whole(DType::bf16, {2 * kTokens, 576});
    gather({0, 0}, {0, kTokens, 2 * kTokens}, whole, 1);
    for (const int threads : {2, 3, 8}) {
      HostTensor again(DType::bf16, {2 * kTokens, 576});
      gather({0, 0}, {0, kTokens, 2 * kTokens}, again, threads);
      EXPECT_EQ(again.snapshot(), whole.snapshot()) << threads << " threads";
    }
    HostTensor chunks(DType::bf16, {2 * kTokens, 576});
    for (std::int32_t begin = 0; begin < kTokens; begin += 47) {
      const std::int32_t n = std::min<std::int32_t>(47, kTokens - begin);
      HostTensor chunk(DType::bf16, {2 * n, 576});
      gather({begin, begin}, {0, n, 2 * n}, chunk, 2);
      for (const std::int64_t r : {0, 1}) {
        std::memcpy(chunks.view().slice(0, r * kTokens + begin, n).data,
                    chunk.view().slice(0, r * n, n).data, static_cast<std::size_t>(n) * 576 * 2);
      }
    }
    EXPECT_EQ(chunks.snapshot(), whole.snapshot()) << to_string(stored);
  }
}

TEST(GatherMlaCache, NoRequestsAreNoError) {
  HostTensor cache(DType::bf16, {2, 16, 64}), dst(DType::bf16, {3, 64}),
      bytes(DType::u8, {2, 16, 656}), wide(DType::bf16, {3, 576});
  const std::vector<std::int32_t> zero = {0};
  const ConstTensorView table(zero.data(), DType::i32, {0, 1});
  dst.fill_bytes(0x5A);
  const auto before = dst.snapshot();
  gather_and_maybe_dequant_cache({cache, dst, table, i32(zero)});
  cp_gather_cache({cache, dst, table, i32(zero)});
  EXPECT_EQ(dst.snapshot(), before);
  cp_gather_and_upconvert_fp8_kv_cache(
      {bytes, wide, table, ConstTensorView(zero.data(), DType::i32, {0})});
}

}  // namespace
}  // namespace attend
