// SPDX-License-Identifier: Apache-2.0
// Cache shapes, and the configurations that the makers refuse.
#include <gmock/gmock.h>

#include <functional>
#include <limits>

#include "attend/backend/selector.h"
#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;

const Backend& flash_attn() { return find_backend("FLASH_ATTN"); }

KvCacheSpec spec() {
  KvCacheSpec s;
  s.num_blocks = 11;
  s.block_size = 32;
  s.num_kv_heads = 2;
  s.head_size = 64;
  return s;
}

ImplConfig impl_config() {
  ImplConfig c;
  c.num_q_heads = 8;
  c.num_kv_heads = 2;
  c.head_size = 64;
  return c;
}

BuilderConfig builder_config() {
  BuilderConfig c;
  c.num_q_heads = 8;
  c.cache = spec();
  return c;
}

TEST(FlashAttnCache, ShapeAndOrder) {
  KvCacheSpec s = spec();
  EXPECT_THAT(flash_attn().kv_cache_shape(s), ElementsAre(2, 11, 32, 2, 64));
  const auto dim = static_cast<std::size_t>(flash_attn().kv_cache_block_dim());
  EXPECT_EQ(flash_attn().kv_cache_shape(s).at(dim), s.num_blocks);
  s.num_layers = 3;
  EXPECT_THAT(flash_attn().kv_cache_shape(s), ElementsAre(3, 2, 11, 32, 2, 64));
  EXPECT_THAT(flash_attn().kv_cache_stride_order(KvLayout::nhd, false, KvFormat::plain),
              ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(flash_attn().kv_cache_stride_order(KvLayout::hnd, false, KvFormat::plain),
              ElementsAre(0, 1, 3, 2, 4));
  EXPECT_THAT(flash_attn().kv_cache_stride_order(KvLayout::nhd, true, KvFormat::plain),
              ElementsAre(2, 0, 1, 3, 4, 5));
  EXPECT_THAT(flash_attn().kv_cache_stride_order(KvLayout::hnd, true, KvFormat::plain),
              ElementsAre(2, 4, 0, 1, 3, 5));
  EXPECT_EQ(flash_attn().required_kv_cache_layout(), std::nullopt);
}

TEST(FlashAttnCache, BlockSizesAreMultiplesOf16) {
  KvCacheSpec s = spec();
  for (const int size : {0, -16, 1, 8, 24}) {
    s.block_size = size;
    EXPECT_THROW(flash_attn().kv_cache_shape(s), InvalidArgument) << size;
  }
  EXPECT_EQ(flash_attn().preferred_block_size(48), 48);
  EXPECT_EQ(flash_attn().preferred_block_size(8), 16);
}

template <typename Config>
struct BadConfig {
  const char* argument;
  std::function<void(Config&)> change;
};

TEST(FlashAttnImpl, AcceptsGoodConfigs) {
  ImplConfig c = impl_config();
  EXPECT_NE(flash_attn().make_impl(c), nullptr);
  c.kv_cache_dtype = "bfloat16";
  c.scale = 0.5F;
  c.softcap = 50.0F;
  c.sliding_window = 1;
  c.alibi_slopes.assign(8, 0.25F);
  EXPECT_NE(flash_attn().make_impl(c), nullptr);
}

TEST(FlashAttnImpl, RefusesBadConfigsByName) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<BadConfig<ImplConfig>> cases = {
      {"num_kv_heads", [](auto& c) { c.num_kv_heads = 0; }},
      {"num_q_heads", [](auto& c) { c.num_q_heads = 0; }},
      {"num_q_heads", [](auto& c) { c.num_q_heads = 7; }},
      {"head_size", [](auto& c) { c.head_size = 60; }},
      {"head_size", [](auto& c) { c.head_size = 264; }},
      {"head_size", [](auto& c) { c.head_size = 0; }},
      {"dtype", [](auto& c) { c.dtype = DType::i8; }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "f16"; }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "int8"; }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "fp8_ds_mla"; }},
      {"kv_cache_dtype",
       [](auto& c) {
         c.kv_cache_dtype = "fp8";
         c.attn_type = AttentionType::encoder;
       }},
      {"k_scale", [](auto& c) { c.k_scale = {1.0F}; }},
      {"v_scale",
       [](auto& c) {
         c.kv_cache_dtype = "fp8";
         c.k_scale = {1.0F};
       }},
      {"k_scale",
       [](auto& c) {
         c.kv_cache_dtype = "fp8_e5m2";
         c.k_scale = c.v_scale = {1.0F, 0.0F};
       }},
      {"v_scale",
       [=](auto& c) {
         c.kv_cache_dtype = "fp8";
         c.k_scale = {1.0F};
         c.v_scale = {nan};
       }},
      {"k_scale",
       [](auto& c) {
         c.kv_cache_dtype = "fp8";
         c.k_scale = c.v_scale = {1.0F, 1.0F, 1.0F};
       }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "nonsense"; }},
      {"scale", [](auto& c) { c.scale = 0.0F; }},
      {"scale", [=](auto& c) { c.scale = nan; }},
      {"scale", [=](auto& c) { c.scale = inf; }},
      {"softcap", [](auto& c) { c.softcap = -1.0F; }},
      {"softcap", [=](auto& c) { c.softcap = nan; }},
      {"softcap", [=](auto& c) { c.softcap = inf; }},
      {"sliding_window", [](auto& c) { c.sliding_window = 0; }},
      {"alibi_slopes", [](auto& c) { c.alibi_slopes.assign(7, 1.0F); }},
      {"alibi_slopes", [=](auto& c) { c.alibi_slopes.assign(8, nan); }},
      {"sliding_window",
       [](auto& c) {
         c.attn_type = AttentionType::encoder_decoder;
         c.sliding_window = 4;
       }},
      {"alibi_slopes",
       [](auto& c) {
         c.attn_type = AttentionType::encoder_decoder;
         c.alibi_slopes.assign(8, 1.0F);
       }},
      {"shares_kv_cache",
       [](auto& c) {
         c.attn_type = AttentionType::encoder_only;
         c.shares_kv_cache = true;
       }},
  };
  for (const auto& bad : cases) {
    ImplConfig c = impl_config();
    bad.change(c);
    try {
      flash_attn().make_impl(c);
      ADD_FAILURE() << "no exception for a bad " << bad.argument;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), bad.argument) << e.what();
    }
  }
}

TEST(FlashAttnBuilder, RefusesBadConfigsByName) {
  const std::vector<BadConfig<BuilderConfig>> cases = {
      {"num_q_heads", [](auto& c) { c.num_q_heads = 7; }},
      {"num_kv_heads", [](auto& c) { c.cache.num_kv_heads = 0; }},
      {"head_size", [](auto& c) { c.cache.head_size = 4; }},
      {"cache.dtype", [](auto& c) { c.cache.dtype = DType::i8; }},
      {"cache.format",
       [](auto& c) {
         c.cache.format = KvFormat::fp8_ds_mla;
         c.cache.dtype = DType::u8;
         c.cache.num_kv_heads = 1;
         c.cache.head_size = 576;
       }},
      {"num_blocks", [](auto& c) { c.cache.num_blocks = 0; }},
      {"block_size", [](auto& c) { c.cache.block_size = 8; }},
      {"window_left", [](auto& c) { c.window_left = -2; }},
      {"window_right", [](auto& c) { c.window_right = -2; }},
      {"num_speculative_tokens", [](auto& c) { c.num_speculative_tokens = -1; }},
      {"num_speculative_tokens",
       [](auto& c) { c.num_speculative_tokens = std::numeric_limits<int>::max(); }},
      {"num_workers", [](auto& c) { c.num_workers = 0; }},
      {"window_left",
       [](auto& c) {
         c.attn_type = AttentionType::encoder_decoder;
         c.window_left = 0;
       }},
      {"window_right",
       [](auto& c) {
         c.attn_type = AttentionType::encoder_decoder;
         c.window_right = 5;
       }},
      {"num_blocks",
       [](auto& c) {
         c.attn_type = AttentionType::encoder_decoder;
         c.cache.num_blocks = 0;
       }},
  };
  for (const auto& bad : cases) {
    BuilderConfig c = builder_config();
    bad.change(c);
    try {
      flash_attn().make_builder(c);
      ADD_FAILURE() << "no exception for a bad " << bad.argument;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), bad.argument) << e.what();
    }
  }
}

TEST(FlashAttnBuilder, EncodersNeedNoBlocks) {
  BuilderConfig c = builder_config();
  c.attn_type = AttentionType::encoder_only;
  c.cache.num_blocks = 0;
  EXPECT_NE(flash_attn().make_builder(c), nullptr);
}

TEST(FlashAttnBuilder, DecodeThresholdCountsSpeculativeTokens) {
  BuilderConfig c = builder_config();
  EXPECT_EQ(flash_attn().make_builder(c)->reorder_batch_threshold(), 1);
  c.num_speculative_tokens = 3;
  EXPECT_EQ(flash_attn().make_builder(c)->reorder_batch_threshold(), 4);
}

}  // namespace
}  // namespace attend
