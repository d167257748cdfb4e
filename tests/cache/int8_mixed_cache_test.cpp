// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/int8_mixed_cache.h"

#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/cache.h"
#include "attend/ops/int8_cache.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

constexpr std::int64_t kHeads = 2, kBlock = 4, kDim = 8;
constexpr std::int64_t kBlockElements = kHeads * kBlock * kDim;

std::vector<std::int64_t> shape_of(std::int64_t blocks) {
  return int8_mixed_cache_shape({.num_blocks = blocks,
                                 .block_size = kBlock,
                                 .num_kv_heads = kHeads,
                                 .head_size = kDim,
                                 .dtype = DType::i8});
}

HostTensor random_cache(Rng& rng, std::int64_t blocks) {
  HostTensor cache(DType::i8, shape_of(blocks));
  for (std::int8_t& byte : cache.as<std::int8_t>()) byte = static_cast<std::int8_t>(rng.next());
  return cache;
}

// Bytes of a block of the values by the definition: [2b, 2b + 2) blocks behind plane 0.
std::vector<std::int8_t> value_bytes(const HostTensor& cache, std::int64_t block) {
  const auto plane = cache.as<std::int8_t>().size() / 3;
  const auto bytes = cache.as<std::int8_t>().subspan(
      plane + static_cast<std::size_t>(2 * block * kBlockElements), 2 * kBlockElements);
  return {bytes.begin(), bytes.end()};
}

std::vector<std::int8_t> key_bytes(const HostTensor& cache, std::int64_t block) {
  const auto bytes = cache.as<std::int8_t>().subspan(
      static_cast<std::size_t>(block * kBlockElements), kBlockElements);
  return {bytes.begin(), bytes.end()};
}

// Odd numbers of blocks put one block of values into both planes.
class Int8MixedCacheTest : public ::testing::TestWithParam<std::int64_t> {};
INSTANTIATE_TEST_SUITE_P(Blocks, Int8MixedCacheTest, ::testing::Values(1, 2, 3, 4, 5, 7));

TEST_P(Int8MixedCacheTest, TheViewsCoverTheTensorOnce) {
  const std::int64_t blocks = GetParam();
  HostTensor cache(DType::i8, shape_of(blocks));
  const TensorView keys = int8_mixed_key_view(cache);
  const TensorView values = int8_mixed_value_view(cache, DType::bf16);
  EXPECT_EQ(describe(keys), "[" + std::to_string(blocks) + ", 2, 4, 8] i8 cpu:0");
  EXPECT_EQ(describe(values), "[" + std::to_string(blocks) + ", 2, 4, 8] bf16 cpu:0");
  auto* begin = static_cast<std::byte*>(cache.view().data);
  EXPECT_EQ(keys.data, begin);
  EXPECT_EQ(values.data, begin + keys.numel());
  EXPECT_EQ(keys.numel() + 2 * values.numel(), cache.numel());
  EXPECT_TRUE(keys.is_contiguous());
  EXPECT_TRUE(values.is_contiguous());
}

TEST_P(Int8MixedCacheTest, CopyingBlocksThroughTheViewsKeepsAllOthers) {
  const std::int64_t blocks = GetParam();
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (std::int64_t from = 0; from < blocks; ++from) {
    for (std::int64_t to = 0; to < blocks; ++to) {
      HostTensor cache = random_cache(rng, blocks);
      HostTensor before(DType::i8, shape_of(blocks));
      std::ranges::copy(cache.as<std::int8_t>(), before.as<std::int8_t>().begin());
      const std::array views = {int8_mixed_key_view(cache),
                                int8_mixed_value_view(cache, DType::f16)};
      const BlockMove move{from, to};
      copy_blocks(views, 0, {&move, 1});
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t source = b == to ? from : b;
        ASSERT_EQ(key_bytes(cache, b), key_bytes(before, source)) << from << " to " << to;
        ASSERT_EQ(value_bytes(cache, b), value_bytes(before, source)) << from << " to " << to;
      }
    }
  }
}

TEST_P(Int8MixedCacheTest, SwapsToACacheWithAnotherNumberOfBlocks) {
  const std::int64_t blocks = GetParam();
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  HostTensor device = random_cache(rng, blocks);
  HostTensor host = random_cache(rng, blocks + 2);
  HostTensor before(DType::i8, shape_of(blocks + 2));
  std::ranges::copy(host.as<std::int8_t>(), before.as<std::int8_t>().begin());
  const BlockMove move{blocks - 1, blocks};
  swap_blocks(int8_mixed_key_view(device), int8_mixed_key_view(host), 0, {&move, 1});
  swap_blocks(int8_mixed_value_view(device, DType::f16), int8_mixed_value_view(host, DType::f16), 0,
              {&move, 1});
  for (std::int64_t b = 0; b < blocks + 2; ++b) {
    const bool moved = b == move.to;
    ASSERT_EQ(key_bytes(host, b), moved ? key_bytes(device, move.from) : key_bytes(before, b));
    ASSERT_EQ(value_bytes(host, b),
              moved ? value_bytes(device, move.from) : value_bytes(before, b));
  }
}

// Why the views are needed: the same move along dimension 1 of the tensor hits other values.
TEST(Int8MixedCacheTest, MovingDimensionOneWouldBreakValues) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  HostTensor cache = random_cache(rng, 3);
  const auto last = value_bytes(cache, 2);
  const auto wanted = value_bytes(cache, 0);
  const std::array whole = {cache.view()};
  const BlockMove move{0, 1};
  copy_blocks(whole, 1, {&move, 1});
  EXPECT_NE(value_bytes(cache, 1), wanted);
  EXPECT_NE(value_bytes(cache, 2), last) << "a block that no move names";
}

TEST(Int8MixedCacheTest, RowsWrittenThroughTheViewsReadBack) {
  Rng rng(4);
  SCOPED_TRACE(rng.trace());
  constexpr std::int64_t kBlocks = 3, kTokens = kBlocks * kBlock;
  HostTensor cache(DType::i8, shape_of(kBlocks));
  HostTensor key(DType::i8, {kTokens, kHeads, kDim}), value(DType::bf16, {kTokens, kHeads, kDim});
  HostTensor k_scale(DType::f32, {kTokens, kHeads}), scales(DType::f32, {kBlocks, kHeads, kBlock});
  for (std::int8_t& code : key.as<std::int8_t>()) code = static_cast<std::int8_t>(rng.next());
  value.fill_normal(rng);
  k_scale.fill_normal(rng);
  std::vector<std::int64_t> slots;
  for (std::int64_t t = 0; t < kTokens; ++t) slots.push_back(t * 5 % kTokens);
  const TensorView keys = int8_mixed_key_view(cache);
  const TensorView values = int8_mixed_value_view(cache, DType::bf16);
  reshape_and_cache_flash_mix({key, value, k_scale, keys, values, scales,
                               ConstTensorView(slots.data(), DType::i64, {kTokens})});
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const std::int64_t block = slots[static_cast<std::size_t>(t)] / kBlock;
    const std::int64_t offset = slots[static_cast<std::size_t>(t)] % kBlock;
    for (std::int64_t h = 0; h < kHeads; ++h) {
      for (std::int64_t d = 0; d < kDim; ++d) {
        const auto at =
            static_cast<std::size_t>(((block * kHeads + h) * kBlock + offset) * kDim + d);
        const auto from = static_cast<std::size_t>((t * kHeads + h) * kDim + d);
        ASSERT_EQ(keys.as<std::int8_t>()[at], key.as<std::int8_t>()[from]);
        ASSERT_EQ(testing::get(values, {block, h, offset, d}), testing::get(value, {t, h, d}));
      }
    }
  }
}

TEST(Int8MixedCacheTest, OtherTensorsAreRefused) {
  HostTensor cache(DType::i8, shape_of(3));
  const auto blamed = [&](const std::function<void(TensorView&)>& change, DType dtype) {
    TensorView t = cache;
    change(t);
    try {
      int8_mixed_value_view(t, dtype);
    } catch (const InvalidArgument& e) {
      return e.argument();
    }
    return std::string("nothing");
  };
  EXPECT_EQ(blamed([](auto&) {}, DType::f16), "nothing");
  EXPECT_EQ(blamed([](auto&) {}, DType::f32), "dtype");
  EXPECT_EQ(blamed([](auto& t) { t.dtype = DType::u8; }, DType::f16), "cache");
  EXPECT_EQ(blamed([](auto& t) { t.shape[0] = 2; }, DType::f16), "cache");
  EXPECT_EQ(blamed([](auto& t) { t = t.select(4, 0); }, DType::f16), "cache");
  EXPECT_EQ(blamed([](auto& t) { t = t.permute({0, 1, 3, 2, 4}); }, DType::f16), "cache");
  EXPECT_EQ(blamed([](auto& t) { t = TensorView(t.data, DType::i8, {3, 3, 1, 1, 1}); }, DType::f16),
            "cache")
      << "plane 1 begins at an odd address";
  TensorView small = cache.view().slice(4, 0, 4);
  EXPECT_THROW(int8_mixed_key_view(small), InvalidArgument);
  KvCacheSpec spec{.num_blocks = 1, .num_kv_heads = 1, .head_size = 8, .dtype = DType::i8};
  EXPECT_NO_THROW(int8_mixed_cache_shape(spec));
  spec.num_layers = 2;
  EXPECT_THROW(int8_mixed_cache_shape(spec), InvalidArgument);
  spec.num_layers = 0;
  spec.dtype = DType::bf16;
  EXPECT_THROW(int8_mixed_cache_shape(spec), InvalidArgument);
}

}  // namespace
}  // namespace attend
