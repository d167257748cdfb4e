// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/int8_cache.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

constexpr std::int64_t kHeads = 3, kDim = 8, kBlocks = 3, kBlock = 4, kTokens = 5;

HostTensor random_bytes(Rng& rng, DType dtype, std::initializer_list<std::int64_t> shape) {
  HostTensor t(dtype, shape);
  for (std::size_t i = 0; i < t.bytes(); ++i) {
    static_cast<unsigned char*>(t.view().data)[i] = static_cast<unsigned char>(rng.next());
  }
  return t;
}

HostTensor untouched(DType dtype, std::initializer_list<std::int64_t> shape) {
  return std::move(HostTensor(dtype, shape).fill_bytes(0x5A));
}

bool all_untouched(const HostTensor& t) {
  for (const unsigned char byte : t.snapshot()) {
    if (byte != 0x5A) return false;
  }
  return true;
}

// Arguments of the two functions that copy codes.
struct CodeRows {
  explicit CodeRows(Rng& rng, DType value_dtype)
      : key(random_bytes(rng, DType::i8, {kTokens + 1, kHeads, kDim})),
        value(random_bytes(rng, value_dtype, {kTokens + 1, kHeads, 2 * kDim})),
        k_scale(random_bytes(rng, DType::f32, {kTokens + 1, kHeads})),
        key_cache(untouched(DType::i8, {kBlocks, kHeads, kBlock, kDim})),
        value_cache(untouched(value_dtype, {kBlocks, kHeads, kBlock, 2 * kDim})),
        key_scale_cache(untouched(DType::f32, {kBlocks, kHeads, kBlock})) {}

  ReshapeAndCacheInt8Args args() const {
    return {key,
            value,
            k_scale,
            key_cache,
            value_cache,
            key_scale_cache,
            ConstTensorView(slots.data(), DType::i64, {kTokens})};
  }

  HostTensor key, value, k_scale, key_cache, value_cache, key_scale_cache;
  std::vector<std::int64_t> slots = {11, 0, -1, 6, 0};
};

// Bytes of row `t` of head h, and of the slot, agree; -1 = never written.
void expect_slot(const HostTensor& cache, const HostTensor& rows, std::int64_t slot,
                 std::int64_t row) {
  const auto row_bytes = rows.bytes() / ((kTokens + 1) * kHeads);
  for (std::int64_t h = 0; h < kHeads; ++h) {
    const auto place = static_cast<std::size_t>((slot / kBlock * kHeads + h) * kBlock) +
                       static_cast<std::size_t>(slot % kBlock);
    const auto* got = static_cast<const unsigned char*>(cache.view().data) + place * row_bytes;
    const auto* from =
        static_cast<const unsigned char*>(rows.view().data) +
        static_cast<std::size_t>(std::max<std::int64_t>(row, 0) * kHeads + h) * row_bytes;
    for (std::size_t i = 0; i < row_bytes; ++i) {
      ASSERT_EQ(got[i], row < 0 ? 0x5A : from[i]) << "slot " << slot << " head " << h;
    }
  }
}

void expect_written(const CodeRows& p) {
  for (std::int64_t slot = 0; slot < kBlocks * kBlock; ++slot) {
    std::int64_t row = -1;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      if (p.slots[static_cast<std::size_t>(t)] == slot) row = t;  // the later one wins
    }
    expect_slot(p.key_cache, p.key, slot, row);
    expect_slot(p.value_cache, p.value, slot, row);
    expect_slot(p.key_scale_cache, p.k_scale, slot, row);
  }
}

TEST(Int8CacheTest, CopiesCodesAndScales) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  const CodeRows int8(rng, DType::i8);
  reshape_and_cache_flash_int8(int8.args());
  expect_written(int8);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    const CodeRows mixed(rng, dtype);
    reshape_and_cache_flash_mix(mixed.args());
    expect_written(mixed);
  }
}

// The argument that an op blames after `change`; checks that nothing was written.
std::string blamed(bool mixed, const std::function<void(ReshapeAndCacheInt8Args&)>& change) {
  Rng rng(2);
  CodeRows p(rng, mixed ? DType::bf16 : DType::i8);
  ReshapeAndCacheInt8Args a = p.args();
  change(a);
  try {
    mixed ? reshape_and_cache_flash_mix(a) : reshape_and_cache_flash_int8(a);
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.op(), mixed ? "reshape_and_cache_flash_mix" : "reshape_and_cache_flash_int8");
    const bool clean = all_untouched(p.key_cache) && all_untouched(p.value_cache) &&
                       all_untouched(p.key_scale_cache);
    return clean ? e.argument() : e.argument() + ", but wrote";
  }
  return "nothing";
}

TEST(Int8CacheTest, BadInputIsNamedAndNothingWritten) {
  static const std::int64_t outside[] = {0, 12, 1, 2, 3};
  for (const bool mixed : {false, true}) {
    const auto expect = [&](std::string_view argument, auto change) {
      EXPECT_EQ(blamed(mixed, change), argument) << (mixed ? "mix" : "int8");
    };
    expect("nothing", [](auto&) {});
    expect("key", [](auto& a) { a.key.dtype = DType::u8; });
    expect("key", [](auto& a) { std::swap(a.key.strides[1], a.key.strides[2]); });
    expect("value", [](auto& a) { a.value.dtype = DType::fp8_e4m3; });
    expect("value", [](auto& a) { a.value.shape[0] = 1; });
    expect("k_scale", [](auto& a) { a.k_scale.dtype = DType::i32; });
    expect("k_scale", [](auto& a) { a.k_scale.shape[1] = 1; });
    expect("k_scale", [](auto& a) { a.k_scale = {}; });
    expect("key_cache", [](auto& a) { a.key_cache.shape[1] = 2; });
    expect("key_cache", [](auto& a) { a.key_cache.shape[3] = 4; });
    expect("key_cache", [](auto& a) { a.key_cache.strides[0] = 0; });
    expect("value_cache", [](auto& a) { a.value_cache.shape[0] = 1; });
    expect("value_cache", [](auto& a) { a.value_cache.shape[2] = 2; });
    expect("value_cache", [](auto& a) { a.value_cache.dtype = DType::f32; });
    expect("value_cache", [](auto& a) { a.value_cache.data = a.key_cache.data; });
    expect("key_scale_cache", [](auto& a) { a.key_scale_cache.shape[2] = 1; });
    expect("key_scale_cache", [](auto& a) { a.key_scale_cache.strides[1] = 0; });
    expect("key_scale_cache", [](auto& a) { a.key_scale_cache.data = a.value_cache.data; });
    expect("slot_mapping", [](auto& a) { a.slot_mapping = {outside, DType::i64, {5}}; });
    expect("slot_mapping", [](auto& a) { a.slot_mapping.shape[0] = 7; });
    expect("slot_mapping", [](auto& a) { a.slot_mapping.dtype = DType::i32; });
  }
  EXPECT_EQ(blamed(false, [](auto& a) { a.value.dtype = DType::bf16; }), "value");
  EXPECT_EQ(blamed(true, [](auto& a) { a.value.dtype = DType::i8; }), "value");
}

// Rows [2, 1, 4] into slots of a cache of two blocks.
struct PerTokenHead {
  ReshapeAndCachePerTokenHeadArgs args() const {
    return {ConstTensorView(key.data(), DType::f32, {2, 1, 4}),
            ConstTensorView(value.data(), DType::f32, {2, 1, 4}),
            k_cache,
            v_cache,
            k_scales,
            v_scales,
            ConstTensorView(slots.data(), DType::i64, {2})};
  }
  bool clean() const {
    return all_untouched(k_cache) && all_untouched(v_cache) && all_untouched(k_scales) &&
           all_untouched(v_scales);
  }

  std::vector<float> key = {254, -127, 1, 3, 0, 0, 0, 0}, value = {127, 0.5, 1.5, -127, 1, 2, 3, 4};
  std::vector<std::int64_t> slots = {3, 0};
  HostTensor k_cache = untouched(DType::i8, {2, 2, 1, 4});
  HostTensor v_cache = untouched(DType::i8, {2, 2, 1, 4});
  HostTensor k_scales = untouched(DType::f32, {2, 2, 1});
  HostTensor v_scales = untouched(DType::f32, {2, 2, 1});
};

std::vector<int> codes_in(const HostTensor& cache, std::size_t slot) {
  const auto codes = cache.as<std::int8_t>().subspan(slot * 4, 4);
  return {codes.begin(), codes.end()};
}

TEST(Int8PerTokenHeadTest, QuantisesWhileWriting) {
  PerTokenHead p;
  reshape_and_cache_int8_per_token_head(p.args());
  EXPECT_EQ(codes_in(p.k_cache, 3), (std::vector<int>{127, -64, 0, 2}));
  EXPECT_EQ(p.k_scales.as<float>()[3], 2.0F);
  EXPECT_EQ(codes_in(p.v_cache, 3), (std::vector<int>{127, 0, 2, -127}));
  EXPECT_EQ(p.v_scales.as<float>()[3], 1.0F);
  EXPECT_EQ(codes_in(p.k_cache, 0), (std::vector<int>{0, 0, 0, 0}));
  EXPECT_EQ(p.k_scales.as<float>()[0], 1e-6F);
  EXPECT_EQ(codes_in(p.v_cache, 0), (std::vector<int>{32, 64, 95, 127}));
  EXPECT_EQ(codes_in(p.k_cache, 1), (std::vector<int>(4, 0x5A))) << "no row has this slot";
}

TEST(Int8PerTokenHeadTest, ARowThatIsNotFiniteReadsAsNan) {
  PerTokenHead p;
  p.key[5] = -std::numeric_limits<float>::infinity();
  reshape_and_cache_int8_per_token_head(p.args());
  EXPECT_EQ(codes_in(p.k_cache, 0), (std::vector<int>{0, 0, 0, 0}));
  EXPECT_TRUE(std::isnan(p.k_scales.as<float>()[0]));
  EXPECT_EQ(p.k_scales.as<float>()[3], 2.0F);
}

TEST(Int8PerTokenHeadTest, BadInputIsNamedAndNothingWritten) {
  const auto expect = [](std::string_view argument, auto change) {
    PerTokenHead p;
    ReshapeAndCachePerTokenHeadArgs a = p.args();
    change(p, a);
    std::string blamed = "nothing";
    try {
      reshape_and_cache_int8_per_token_head(a);
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "reshape_and_cache_int8_per_token_head");
      blamed = e.argument();
      EXPECT_TRUE(p.clean()) << blamed;
    }
    EXPECT_EQ(blamed, argument);
  };
  expect("nothing", [](auto&, auto&) {});
  expect("key", [](auto&, auto& a) { a.key.dtype = DType::i8; });
  expect("value", [](auto&, auto& a) { a.value.dtype = DType::i32; });
  expect("value", [](auto&, auto& a) { a.value.shape[0] = 1; });
  expect("key_cache", [](auto&, auto& a) { a.key_cache.dtype = DType::u8; });
  expect("key_cache", [](auto&, auto& a) { a.key_cache.shape[3] = 2; });
  expect("value_cache", [](auto&, auto& a) { a.value_cache.shape[1] = 1; });
  expect("value_cache", [](auto&, auto& a) { a.value_cache = a.key_cache; });
  expect("key_scale_cache", [](auto&, auto& a) { a.key_scale_cache.shape[2] = 2; });
  expect("key_scale_cache", [](auto&, auto& a) { a.key_scale_cache = {}; });
  expect("value_scale_cache", [](auto&, auto& a) { a.value_scale_cache.dtype = DType::bf16; });
  expect("value_scale_cache", [](auto&, auto& a) { a.value_scale_cache = a.key_scale_cache; });
  expect("slot_mapping", [](auto& p, auto&) { p.slots[1] = 4; });
}

}  // namespace
}  // namespace attend
