// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/ops/mla_cache.h"
#include "ops/rotary.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Row = std::array<std::uint8_t, fp8_ds_mla::kRowBytes>;

// The row that a latent becomes; rope element i has the bits 0x7F80 + i.
Row ds_row_of(const std::vector<float>& latent) {
  HostTensor kv_c(DType::bf16, {1, fp8_ds_mla::kLatent}), k_pe(DType::bf16, {1, fp8_ds_mla::kRope});
  for (std::size_t i = 0; i < latent.size(); ++i) kv_c.as<bf16>()[i] = to_bf16(latent[i]);
  for (std::size_t i = 0; i < fp8_ds_mla::kRope; ++i)
    k_pe.as<bf16>()[i].bits = static_cast<std::uint16_t>(0x7F80 + i);
  Row row;
  const std::int64_t slot = 0;
  concat_and_cache_mla({kv_c, k_pe, TensorView(row.data(), DType::u8, {1, 1, 656}),
                        ConstTensorView(&slot, DType::i64, {1})});
  return row;
}

std::uint32_t scale_bits(const Row& row, int tile) {
  std::uint32_t bits;
  std::memcpy(&bits, &row[static_cast<std::size_t>(fp8_ds_mla::kScalesAt + 4 * tile)], 4);
  return bits;
}

// Every byte of the row, made by hand.
TEST(ConcatAndCacheMla, WritesTheBytesOfTheFormat) {
  std::vector<float> latent(512, 0.0F);
  Row expected{};
  const auto set = [&](std::size_t at, float x, int code) {
    latent[at] = x;
    expected[at] = static_cast<std::uint8_t>(code);
  };
  const auto set_scale = [&](int tile, std::uint32_t bits) {
    std::memcpy(&expected[static_cast<std::size_t>(512 + 4 * tile)], &bits, 4);
  };
  // Largest magnitude 448: scale 1.
  set(0, 448.0F, 0x7E), set(1, -448.0F, 0xFE), set(2, 1.0F, 0x38), set(3, 1.0625F, 0x38);
  set(4, 1.1875F, 0x3A), set(127, -0.0F, 0x80);
  set_scale(0, 0x3F800000);
  // Largest magnitude 1: scale 1 / 448, which is no power of two and stays as it is.
  set(128, -1.0F, 0xFE), set(129, 0.5F, 0x76), set(255, -0.25F, 0xEE);
  set_scale(1, 0x3B124925);
  // Nothing but zeros: the smallest scale, no NaN.
  set(300, -0.0F, 0x80);
  set_scale(2, 0x00800000);
  // What is not finite is the NaN code with its sign and does not count for the scale of 2.
  set(384, kNan, 0x7F), set(385, -kNan, 0xFF), set(386, kInf, 0x7F), set(387, -kInf, 0xFF);
  set(388, 896.0F, 0x7E), set(511, -2.0F, 0xB8);
  set_scale(3, 0x40000000);
  for (std::size_t i = 0; i < 64; ++i) {
    expected[528 + 2 * i] = static_cast<std::uint8_t>(0x80 + i);
    expected[529 + 2 * i] = 0x7F;
  }
  const Row row = ds_row_of(latent);
  for (std::size_t i = 0; i < row.size(); ++i) EXPECT_EQ(row[i], expected[i]) << "byte " << i;
}

TEST(ConcatAndCacheMla, TinyTilesHaveTheSmallestScale) {
  std::vector<float> latent(512, 0.0F);
  latent[0] = 0x1p-133F;  // the smallest of bf16
  latent[128] = 0x1p-119F;
  latent[256] = 0x1.FEp127F;  // the largest
  const Row row = ds_row_of(latent);
  EXPECT_EQ(scale_bits(row, 0), 0x00800000U);
  EXPECT_EQ(row[0], 0x04);  // 2^-133 / 2^-126 = 2^-7
  EXPECT_EQ(scale_bits(row, 1), 0x00800000U) << "2^-119 / 448 is below it";
  EXPECT_EQ(row[128], 0x70);  // 2^7
  EXPECT_EQ(row[256], 0x7E);
}

TEST(ConcatAndCacheMla, ATileOfNanAloneHasTheSmallestScale) {
  std::vector<float> latent(512, 0.0F);
  std::fill(latent.begin() + 128, latent.begin() + 256, kNan);
  const Row row = ds_row_of(latent);
  EXPECT_EQ(scale_bits(row, 1), 0x00800000U);
  for (std::size_t i = 128; i < 256; ++i) EXPECT_EQ(row[i], 0x7F);
}

struct Shape {
  DType dtype = DType::bf16, stored = DType::bf16;
  std::int64_t tokens = 9, latent = 512, rope = 64, heads = 3;
};

// Everything a call needs, with random rows; caches start as 0x5A.
struct Problem {
  Shape shape;
  HostTensor kv_c, k_pe, q_pe, tables, cache;
  std::vector<std::int64_t> slots, positions;
  float scale = 0.03F;

  Problem(const Shape& s, Rng& rng, DType table_dtype)
      : shape(s),
        kv_c(s.dtype, {s.tokens + 1, s.latent}),
        k_pe(s.dtype, {s.tokens + 1, s.rope}),
        q_pe(s.dtype, {s.tokens + 1, s.heads, s.rope}),
        tables(table_dtype, {50, s.rope}),
        cache(s.stored, {s.tokens / 16 + 2, 16,
                         s.stored == DType::u8 ? fp8_ds_mla::kRowBytes : s.latent + s.rope}) {
    for (HostTensor* t : {&kv_c, &k_pe, &q_pe, &tables}) t->fill_uniform(rng);
    cache.fill_bytes(0x5A);
    for (std::int64_t t = 0; t < s.tokens; ++t) {
      // Some slots twice, some rows without.
      slots.push_back(rng.chance(0.1) ? -1 : rng.integer(0, s.tokens));
      positions.push_back(rng.integer(0, 49));
    }
  }
  ConstTensorView slot_view() const { return {slots.data(), DType::i64, {shape.tokens}}; }
  ConstTensorView scale_view() const {
    return is_fp8(shape.stored) ? ConstTensorView(&scale, DType::f32, {1}) : ConstTensorView();
  }
  ConcatAndCacheMlaArgs concat() const { return {kv_c, k_pe, cache, slot_view(), scale_view()}; }
  ConcatAndCacheMlaRopeFusedArgs fused(bool is_neox) const {
    return {.positions = {positions.data(), DType::i64, {shape.tokens}},
            .q_pe = q_pe,
            .k_pe = k_pe,
            .kv_c = kv_c,
            .cos_sin_cache = tables,
            .is_neox = is_neox,
            .slot_mapping = slot_view(),
            .kv_cache = cache,
            .scale = scale_view()};
  }
};

std::vector<Shape> shapes(std::int64_t tokens) {
  std::vector<Shape> all = {{DType::bf16, DType::u8, tokens}};
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const DType stored : {dtype, DType::fp8_e4m3, DType::fp8_e5m2})
      all.push_back({dtype, stored, tokens, 256, 64});
  }
  return all;
}

TEST(ConcatAndCacheMla, RowsArePutTogetherBitForBit) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Problem p({dtype, dtype, 20, 40, 24}, rng, dtype);
    p.kv_c.fill_bytes(0xFF);  // NaN with a payload
    concat_and_cache_mla(p.concat());
    const std::size_t item = size_of(dtype);
    const std::vector<unsigned char> cache = p.cache.snapshot(), keys = p.k_pe.snapshot();
    for (std::int64_t slot = 0; slot < 48; ++slot) {
      const unsigned char* row = &cache[static_cast<std::size_t>(slot) * 64 * item];
      const auto last = std::find(p.slots.rbegin(), p.slots.rend(), slot);
      if (last == p.slots.rend()) {
        EXPECT_TRUE(std::all_of(row, row + 64 * item, [](auto b) { return b == 0x5A; }));
        continue;
      }
      const auto t = static_cast<std::size_t>(p.slots.rend() - last - 1);
      EXPECT_TRUE(std::all_of(row, row + 40 * item, [](auto b) { return b == 0xFF; }));
      EXPECT_EQ(std::memcmp(row + 40 * item, &keys[t * 24 * item], 24 * item), 0)
          << "slot " << slot;
    }
  }
}

TEST(ConcatAndCacheMla, WorkersAgreeWithTheSerialOrder) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  for (const Shape& s : shapes(700)) {
    Problem p(s, rng, s.dtype);
    const auto alone = make_thread_pool(1);
    concat_and_cache_mla(p.concat(), alone.get());
    const auto expected = p.cache.snapshot();
    for (const int threads : {2, 3, 8}) {
      p.cache.fill_bytes(0x5A);
      const auto pool = make_thread_pool(threads);
      concat_and_cache_mla(p.concat(), pool.get());
      EXPECT_EQ(p.cache.snapshot(), expected)
          << to_string(s.dtype) << " into " << to_string(s.stored) << ", " << threads << " threads";
    }
  }
}

TEST(ConcatAndCacheMlaRopeFused, IsRotatingByItselfAndThenWriting) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  for (const Shape& s : shapes(400)) {
    for (const bool is_neox : {false, true}) {
      for (const DType table : {s.dtype, DType::f32}) {
        Problem p(s, rng, table);
        Problem q(s, rng, table);
        for (auto [to, from] : {std::pair(&q.kv_c, &p.kv_c), std::pair(&q.k_pe, &p.k_pe),
                                std::pair(&q.q_pe, &p.q_pe)})
          std::memcpy(to->view().data, from->view().data, from->bytes());
        q.slots = p.slots;
        const ConstTensorView both = p.tables;
        const ops::RotaryTables tables{both.slice(1, 0, 32), both.slice(1, 32, 32), !is_neox};
        for (std::int64_t t = 0; t < s.tokens; ++t) {
          const std::int64_t position = p.positions[static_cast<std::size_t>(t)];
          const auto rotate = [&](const TensorView& row) {
            const std::vector<std::byte> old(row.as<std::byte>(),
                                             row.as<std::byte>() + 64 * size_of(s.dtype));
            ops::rotate_row(tables, position, old.data(), row.data, 64, s.dtype);
          };
          for (int h = 0; h < s.heads; ++h) rotate(q.q_pe.view().select(0, t).select(0, h));
          rotate(q.k_pe.view().select(0, t));
        }
        concat_and_cache_mla(q.concat());
        const auto pool = make_thread_pool(3);
        concat_and_cache_mla_rope_fused(p.fused(is_neox), pool.get());
        const std::string where = std::string(to_string(s.dtype)) + " into " +
                                  std::string(to_string(s.stored)) + (is_neox ? " neox" : "");
        EXPECT_EQ(p.q_pe.snapshot(), q.q_pe.snapshot()) << where;
        EXPECT_EQ(p.k_pe.snapshot(), q.k_pe.snapshot()) << where;
        EXPECT_EQ(p.cache.snapshot(), q.cache.snapshot()) << where;
      }
    }
  }
}

// By hand: a quarter turn at position 1, none at position 0.
TEST(ConcatAndCacheMlaRopeFused, PairsElementsAsAsked) {
  for (const bool is_neox : {false, true}) {
    std::vector<float> q = {1, 2, 3, 4}, k = {5, 6, 7, 8, 9, 10, 11, 12}, c = {0, 0}, cache(10);
    q.insert(q.end(), {13, 14, 15, 16});
    const std::vector<float> tables = {1, 1, 0, 0, 0, 0, 1, 1};  // cos, cos, sin, sin
    const std::vector<std::int64_t> positions = {1, 0}, slots = {1, -1};
    concat_and_cache_mla_rope_fused({.positions = {positions.data(), DType::i64, {2}},
                                     .q_pe = {q.data(), DType::f32, {2, 1, 4}},
                                     .k_pe = {k.data(), DType::f32, {2, 4}},
                                     .kv_c = {c.data(), DType::f32, {2, 1}},
                                     .cos_sin_cache = {tables.data(), DType::f32, {2, 4}},
                                     .is_neox = is_neox,
                                     .slot_mapping = {slots.data(), DType::i64, {2}},
                                     .kv_cache = {cache.data(), DType::f32, {1, 2, 5}}});
    using Row = std::vector<float>;
    EXPECT_EQ(q,
              is_neox ? (Row{-3, -4, 1, 2, 13, 14, 15, 16}) : (Row{-2, 1, -4, 3, 13, 14, 15, 16}));
    EXPECT_EQ(k, is_neox ? (Row{-7, -8, 5, 6, 9, 10, 11, 12}) : (Row{-6, 5, -8, 7, 9, 10, 11, 12}));
    EXPECT_EQ(cache, is_neox ? (Row{0, 0, 0, 0, 0, 0, -7, -8, 5, 6})
                             : (Row{0, 0, 0, 0, 0, 0, -6, 5, -8, 7}));
  }
}

// The cosine is no number of bf16: rounded first it would give 161 / 128.
TEST(ConcatAndCacheMlaRopeFused, TablesOfFloat32AreNotRounded) {
  std::vector<bf16> q = {to_bf16(1.25F), to_bf16(0.0F)}, k = q, c(1), cache(3);
  const std::vector<float> tables = {1.01F, 0.0F};
  const std::int64_t zero = 0;
  concat_and_cache_mla_rope_fused({.positions = {&zero, DType::i64, {1}},
                                   .q_pe = {q.data(), DType::bf16, {1, 1, 2}},
                                   .k_pe = {k.data(), DType::bf16, {1, 2}},
                                   .kv_c = {c.data(), DType::bf16, {1, 1}},
                                   .cos_sin_cache = {tables.data(), DType::f32, {1, 2}},
                                   .slot_mapping = {&zero, DType::i64, {1}},
                                   .kv_cache = {cache.data(), DType::bf16, {1, 1, 3}}});
  for (const bf16 x : {q[0], k[0], cache[1]}) EXPECT_EQ(to_f32(x), 162.0F / 128.0F);
}

}  // namespace
}  // namespace attend
