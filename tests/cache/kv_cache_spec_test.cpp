// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/kv_cache_spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <set>

#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;

KvCacheSpec spec(int num_layers = 0) {
  return {.num_blocks = 5,
          .block_size = 16,
          .num_kv_heads = 2,
          .head_size = 8,
          .dtype = DType::bf16,
          .num_layers = num_layers};
}

std::vector<std::int64_t> strides_of(const TensorView& t) {
  return {t.strides.begin(), t.strides.begin() + t.rank};
}

TEST(KvLayoutTest, Names) {
  for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
    EXPECT_EQ(parse_kv_layout(to_string(layout)), layout);
  }
  EXPECT_EQ(parse_kv_layout("hnd"), KvLayout::hnd);
  EXPECT_EQ(parse_kv_layout("Nhd"), std::nullopt);
  EXPECT_EQ(parse_kv_layout(""), std::nullopt);
}

TEST(FlashAttnCacheTest, Shape) {
  EXPECT_THAT(flash_attn_cache_shape(spec()), ElementsAre(2, 5, 16, 2, 8));
  EXPECT_THAT(flash_attn_cache_shape(spec(3)), ElementsAre(3, 2, 5, 16, 2, 8));
  EXPECT_EQ(cache_bytes(flash_attn_cache_shape(spec(3)), DType::bf16), 3 * 2 * 5 * 16 * 2 * 8 * 2);
}

TEST(FlashAttnCacheTest, StrideOrders) {
  EXPECT_THAT(flash_attn_stride_order(KvLayout::nhd, false), ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(flash_attn_stride_order(KvLayout::hnd, false), ElementsAre(0, 1, 3, 2, 4));
  EXPECT_THAT(flash_attn_stride_order(KvLayout::nhd, true), ElementsAre(2, 0, 1, 3, 4, 5));
  EXPECT_THAT(flash_attn_stride_order(KvLayout::hnd, true), ElementsAre(2, 4, 0, 1, 3, 5));
}

TEST(FlashAttnCacheTest, ViewsHaveTheLogicalShapeOverThePhysicalOrder) {
  const auto shape = flash_attn_cache_shape(spec());
  const auto nhd =
      cache_view(nullptr, DType::bf16, shape, flash_attn_stride_order(KvLayout::nhd, false));
  EXPECT_TRUE(nhd.is_contiguous());
  const auto hnd =
      cache_view(nullptr, DType::bf16, shape, flash_attn_stride_order(KvLayout::hnd, false));
  EXPECT_EQ(hnd.shape, nhd.shape);
  EXPECT_THAT(strides_of(hnd), ElementsAre(5 * 256, 256, 8, 16 * 8, 1));
}

TEST(FlashAttnCacheTest, WithLayersABlockIsOutermost) {
  const auto shape = flash_attn_cache_shape(spec(3));
  const auto nhd =
      cache_view(nullptr, DType::bf16, shape, flash_attn_stride_order(KvLayout::nhd, true));
  // physical [blocks, layers, 2, block_size, heads, head_size]
  EXPECT_THAT(strides_of(nhd), ElementsAre(2 * 256, 256, 3 * 2 * 256, 16, 8, 1));
  const auto hnd =
      cache_view(nullptr, DType::bf16, shape, flash_attn_stride_order(KvLayout::hnd, true));
  // physical [blocks, heads, layers, 2, block_size, head_size]
  EXPECT_THAT(strides_of(hnd), ElementsAre(2 * 128, 128, 2 * 3 * 2 * 128, 8, 3 * 2 * 128, 1));
}

TEST(FlashAttnCacheTest, EveryViewCoversTheMemoryOnce) {
  for (const int layers : {0, 2}) {
    for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
      const auto shape = flash_attn_cache_shape(spec(layers));
      const auto view =
          cache_view(nullptr, DType::bf16, shape, flash_attn_stride_order(layout, layers > 0));
      std::set<std::int64_t> offsets;
      for (std::int64_t i = 0; i < view.numel(); ++i) {
        std::int64_t rest = i;
        std::int64_t offset = 0;
        for (int d = view.rank - 1; d >= 0; --d) {
          offset += rest % view.shape[d] * view.strides[d];
          rest /= view.shape[d];
        }
        offsets.insert(offset);
      }
      EXPECT_EQ(*offsets.begin(), 0);
      EXPECT_EQ(*offsets.rbegin(), view.numel() - 1);
      EXPECT_EQ(static_cast<std::int64_t>(offsets.size()), view.numel());
    }
  }
}

TEST(KvCacheSpecTest, RefusesFieldsOutOfRange) {
  const auto argument_of = [](const std::function<void(KvCacheSpec&)>& change) -> std::string {
    KvCacheSpec s = spec();
    change(s);
    try {
      s.validate();
    } catch (const InvalidArgument& e) {
      return e.argument();
    }
    return "valid";
  };
  EXPECT_EQ(argument_of([](auto&) {}), "valid");
  EXPECT_EQ(argument_of([](auto& s) { s.num_blocks = 0; }), "num_blocks");
  EXPECT_EQ(argument_of([](auto& s) { s.block_size = 0; }), "block_size");
  EXPECT_EQ(argument_of([](auto& s) { s.num_kv_heads = -1; }), "num_kv_heads");
  EXPECT_EQ(argument_of([](auto& s) { s.head_size = 0; }), "head_size");
  EXPECT_EQ(argument_of([](auto& s) { s.num_layers = -1; }), "num_layers");
  EXPECT_EQ(argument_of([](auto& s) { s.num_blocks = std::int64_t{1} << 60; }), "num_blocks");
  EXPECT_EQ(argument_of([](auto& s) { s.num_blocks = INT64_MAX; }), "num_blocks");
}

TEST(CacheViewTest, RefusesAnOrderThatIsNoPermutation) {
  const std::vector<std::int64_t> shape = {2, 3};
  for (const std::vector<int>& order : {std::vector{0}, {0, 0}, {0, 2}, {-1, 0}, {0, 1, 2}}) {
    EXPECT_THROW(cache_view(nullptr, DType::f32, shape, order), InvalidArgument);
  }
  const std::vector<std::int64_t> deep(kMaxRank + 1, 1);
  std::vector<int> order(kMaxRank + 1);
  std::iota(order.begin(), order.end(), 0);
  EXPECT_THROW(cache_view(nullptr, DType::f32, deep, order), InvalidArgument);
}

}  // namespace
}  // namespace attend
