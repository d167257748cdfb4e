// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "attend/core/float_types.h"
#include "attend/ops/cache.h"
#include "ops/fp8_encode.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::uint8_t core_code(DType format, float x) {
  return format == DType::fp8_e4m3 ? to_fp8_e4m3(x).bits : to_fp8_e5m2(x).bits;
}

// All signs and exponents with a mantissa sweep that has every tie of both formats.
TEST(Fp8EncodeTest, TheVectorFormAgreesWithTheConversionsOfCore) {
  for (std::uint32_t high = 0; high < 0x10000; ++high) {
    for (const std::uint32_t low : {0U, 1U, 0x7FFFU, 0x8000U, 0xFFFFU}) {
      const auto x = std::bit_cast<float>(high << 16 | low);
      ASSERT_EQ(encode_fp8<E4m3Encoding>(x), to_fp8_e4m3(x).bits) << std::hex << high << low;
      ASSERT_EQ(encode_fp8<E5m2Encoding>(x), to_fp8_e5m2(x).bits) << std::hex << high << low;
    }
  }
}

struct Problem {
  DType input = DType::bf16, cache = DType::fp8_e4m3;
  std::int64_t tokens = 7, heads = 3, scales = 3;
  int threads = 1;
};

// Rows in slots 2, 5, 8, ...; what is not written keeps its bytes.
void expect_encoded(const Problem& p, Rng& rng) {
  constexpr std::int64_t kDim = 40, kBlock = 4;
  HostTensor key(p.input, {p.tokens, p.heads, kDim}), value(p.input, {p.tokens, p.heads, kDim});
  key.fill_normal(rng, 100.0F);
  value.fill_normal(rng, 0.01F);
  HostTensor k_scale(DType::f32, {p.scales}), v_scale(DType::f32, {p.scales});
  k_scale.fill_uniform(rng, 0.05F, 3.0F);
  v_scale.fill_uniform(rng, 0.05F, 3.0F);
  const std::int64_t blocks = (3 * p.tokens + 2) / kBlock + 1;
  HostTensor k_memory(p.cache, {blocks, p.heads, kBlock, kDim});  // HND
  HostTensor v_cache(p.cache, {blocks, kBlock, p.heads, kDim});   // NHD
  k_memory.fill_bytes(0x5A);
  v_cache.fill_bytes(0x5A);
  const TensorView k_cache = k_memory.view().permute({0, 2, 1, 3});
  std::vector<std::int64_t> slots;
  for (std::int64_t t = 0; t < p.tokens; ++t) slots.push_back(3 * t + 2);
  const auto pool = make_thread_pool(p.threads);
  reshape_and_cache_flash({key, value, k_cache, v_cache,
                           ConstTensorView(slots.data(), DType::i64, {p.tokens}), k_scale, v_scale},
                          pool.get());
  const auto check = [&](const TensorView& cache, const HostTensor& rows, const HostTensor& scale) {
    for (std::int64_t slot = 0; slot < blocks * kBlock; ++slot) {
      const std::int64_t t = (slot - 2) / 3;
      const bool written = slot % 3 == 2 && t < p.tokens;
      for (std::int64_t h = 0; h < p.heads; ++h) {
        const float s = scale.as<float>()[p.scales == 1 ? 0 : static_cast<std::size_t>(h)];
        for (std::int64_t d = 0; d < kDim; ++d) {
          const auto got =
              cache.as<std::uint8_t>()[slot / kBlock * cache.strides[0] +
                                       slot % kBlock * cache.strides[1] + h * cache.strides[2] + d];
          const std::uint8_t want =
              written ? core_code(p.cache, static_cast<float>(testing::get(rows, {t, h, d})) / s)
                      : 0x5A;
          ASSERT_EQ(got, want) << "slot " << slot << " head " << h << " dim " << d;
        }
      }
    }
  };
  check(k_cache, key, k_scale);
  check(v_cache, value, v_scale);
}

TEST(Fp8CacheTest, EveryInputAndFormatWithScalesForAllHeadsOrOne) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (const DType input : {DType::f32, DType::f16, DType::bf16}) {
    for (const DType cache : {DType::fp8_e4m3, DType::fp8_e5m2}) {
      for (const std::int64_t scales : {1, 3}) {
        expect_encoded({.input = input, .cache = cache, .scales = scales}, rng);
      }
    }
  }
}

TEST(Fp8CacheTest, WorkersGiveTheSameCodes) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  for (const int threads : {2, 3, 7}) expect_encoded({.tokens = 500, .threads = threads}, rng);
}

// One row [1, 1, 8] into one slot.
std::vector<int> codes_of(std::vector<float> row, DType format, float scale) {
  const std::int64_t slot = 0;
  std::vector<std::uint8_t> k_cache(row.size()), v_cache(row.size());
  const auto n = static_cast<std::int64_t>(row.size());
  // A scale without dimensions, as the field's layers hold it.
  ConstTensorView scalar(&scale, DType::f32, std::span<const std::int64_t>{});
  reshape_and_cache_flash({.key = {row.data(), DType::f32, {1, 1, n}},
                           .value = {row.data(), DType::f32, {1, 1, n}},
                           .key_cache = {k_cache.data(), format, {1, 1, 1, n}},
                           .value_cache = {v_cache.data(), format, {1, 1, 1, n}},
                           .slot_mapping = {&slot, DType::i64, {1}},
                           .k_scale = scalar,
                           .v_scale = scalar});
  EXPECT_EQ(k_cache, v_cache);
  return {k_cache.begin(), k_cache.end()};
}

TEST(Fp8CacheTest, RoundsToEvenSaturatesAndKeepsNan) {
  using Codes = std::vector<int>;
  EXPECT_EQ(
      codes_of({1.0625F, 1.1875F, -1.0F, 448.0F, 465.0F, kInf, -kInf, kNan}, DType::fp8_e4m3, 1.0F),
      (Codes{0x38, 0x3A, 0xB8, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F}));
  EXPECT_EQ(codes_of({0x1p-10F, 0x1.8p-9F, -0.0F, 0.0F}, DType::fp8_e4m3, 1.0F),
            (Codes{0x00, 0x02, 0x80, 0x00}));
  EXPECT_EQ(codes_of({1.125F, 1.375F, 57344.0F, 1e30F, -kInf, -kNan}, DType::fp8_e5m2, 1.0F),
            (Codes{0x3C, 0x3E, 0x7B, 0x7B, 0xFB, 0xFF}));
  EXPECT_EQ(codes_of({8.0F, 1e30F, -1e-30F}, DType::fp8_e4m3, 4.0F), (Codes{0x40, 0x7E, 0x80}));
  EXPECT_EQ(codes_of({1.0F, 0.0F}, DType::fp8_e4m3, 1e-45F), (Codes{0x7E, 0x00}))
      << "the quotient overflows float32";
}

class Fp8CacheErrorTest : public ::testing::Test {
 protected:
  Fp8CacheErrorTest() {
    args_ = {.key = key_,
             .value = value_,
             .key_cache = k_cache_,
             .value_cache = v_cache_,
             .slot_mapping = {slots_.data(), DType::i64, {3}},
             .k_scale = {k_scales_.data(), DType::f32, {2}},
             .v_scale = {v_scales_.data(), DType::f32, {2}}};
  }

  // The error's text after "argument"; checks that nothing was written.
  std::string error(const std::function<void(ReshapeAndCacheFlashArgs&)>& change) {
    ReshapeAndCacheFlashArgs a = args_;
    change(a);
    std::string text = "none";
    try {
      reshape_and_cache_flash(a);
    } catch (const InvalidArgument& e) {
      text = e.what();
      text = text.substr(text.find('\''));
    }
    for (const HostTensor* t : {&k_cache_, &v_cache_}) {
      for (const unsigned char byte : t->snapshot()) {
        if (byte != 0x5A) return text + ", but wrote";
      }
    }
    return text;
  }

  HostTensor key_ = HostTensor(DType::f16, {3, 2, 8});
  HostTensor value_ = HostTensor(DType::f16, {3, 2, 16});
  HostTensor k_cache_ = std::move(HostTensor(DType::fp8_e4m3, {3, 4, 2, 8}).fill_bytes(0x5A));
  HostTensor v_cache_ = std::move(HostTensor(DType::fp8_e4m3, {3, 4, 2, 16}).fill_bytes(0x5A));
  std::vector<std::int64_t> slots_ = {0, 11, -1};
  std::vector<float> k_scales_ = {1.0F, 2.0F}, v_scales_ = {0.5F, 1.0F};
  ReshapeAndCacheFlashArgs args_;
};

TEST_F(Fp8CacheErrorTest, MissingAndMisshapenScales) {
  EXPECT_EQ(error([](auto& a) { a.k_scale = {}; }),
            "'k_scale': expected a scale, which an fp8 cache needs, got none");
  EXPECT_EQ(error([](auto& a) { a.v_scale = {}; }),
            "'v_scale': expected a scale, which an fp8 cache needs, got none");
  EXPECT_EQ(error([&](auto& a) { a.k_scale = {k_scales_.data(), DType::f32, {0}}; }),
            "'k_scale': expected 1 element or 2, one a head, got [0] f32 cpu:0");
  EXPECT_EQ(error([&](auto& a) { a.v_scale = {v_scales_.data(), DType::f32, {1}}; }),
            "'v_scale': expected 2 elements like k_scale, got [1] f32 cpu:0");
  EXPECT_EQ(error([](auto& a) { a.k_scale.dtype = DType::i32; }),
            "'k_scale': expected dtype f32, got [2] i32 cpu:0");
  EXPECT_EQ(error([&](auto& a) { a.k_scale = {k_scales_.data(), DType::f32, {1, 2}}; }),
            "'k_scale': expected rank 1, got [1, 2] f32 cpu:0");
  EXPECT_NE(error([](auto& a) { a.v_scale.strides[0] = 2; }).find("contiguous"), std::string::npos);
}

TEST_F(Fp8CacheErrorTest, ScalesThatAreNoScales) {
  for (const float bad : {0.0F, -1.0F, -0.0F, kInf, -kInf, kNan}) {
    k_scales_[1] = bad;
    EXPECT_EQ(error([](auto&) {}), "'k_scale': expected finite scales above 0, got " +
                                       fmt::format("{}", bad) + " at index 1");
    k_scales_[1] = 2.0F;
    v_scales_[0] = bad;
    EXPECT_EQ(error([](auto&) {}).substr(0, 10), "'v_scale':");
    v_scales_[0] = 0.5F;
  }
  EXPECT_EQ(error([](auto&) {}), "none, but wrote") << "the arguments are good otherwise";
}

TEST_F(Fp8CacheErrorTest, MixedCaches) {
  EXPECT_EQ(error([](auto& a) { a.value_cache.dtype = DType::fp8_e5m2; }).substr(0, 14),
            "'value_cache':");
  EXPECT_EQ(error([](auto& a) { a.key_cache.dtype = DType::i8; }).substr(0, 12), "'key_cache':");
  EXPECT_EQ(error([](auto& a) {
              a.key = ConstTensorView(a.key.data, DType::fp8_e4m3, {3, 2, 8});
            }).substr(0, 6),
            "'key':");
  EXPECT_EQ(error([](auto& a) { a.k_scale.data = a.key_cache.data; }).substr(0, 12), "'key_cache':")
      << "the scales lie in the cache, whose bytes are positive finite numbers";
}

}  // namespace
}  // namespace attend
