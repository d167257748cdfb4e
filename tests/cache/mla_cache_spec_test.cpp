// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/kv_cache_spec.h"
#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;

KvCacheSpec plain(int num_layers = 0) {
  return {.num_blocks = 5,
          .block_size = 64,
          .num_kv_heads = 1,
          .head_size = 576,
          .dtype = DType::bf16,
          .num_layers = num_layers};
}

KvCacheSpec ds(int num_layers = 0) {
  KvCacheSpec s = plain(num_layers);
  s.dtype = DType::u8;
  s.format = KvFormat::fp8_ds_mla;
  return s;
}

// "op: argument" of the error that the call ends in.
std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgument& e) {
    return e.op() + ": " + e.argument();
  }
  return "none";
}

TEST(MlaCacheSpec, ShapesHaveNoPlanesAndNoHeads) {
  EXPECT_THAT(mla_cache_shape(plain()), ElementsAre(5, 64, 576));
  EXPECT_THAT(mla_cache_shape(plain(3)), ElementsAre(3, 5, 64, 576));
  EXPECT_THAT(mla_cache_shape(ds()), ElementsAre(5, 64, 656));
  EXPECT_THAT(mla_cache_shape(ds(3)), ElementsAre(3, 5, 64, 656));
  KvCacheSpec small = plain();
  small.head_size = 320;
  small.dtype = DType::fp8_e4m3;
  EXPECT_THAT(mla_cache_shape(small), ElementsAre(5, 64, 320));
}

TEST(MlaCacheSpec, ABlockOfAllLayersIsOneRunOfBytes) {
  EXPECT_THAT(mla_stride_order(false), ElementsAre(0, 1, 2));
  EXPECT_THAT(mla_stride_order(true), ElementsAre(1, 0, 2, 3));
  const TensorView view =
      cache_view(nullptr, DType::u8, mla_cache_shape(ds(3)), mla_stride_order(true));
  EXPECT_EQ(view.strides[0], 64 * 656);      // layers
  EXPECT_EQ(view.strides[1], 3 * 64 * 656);  // blocks
  EXPECT_EQ(view.strides[2], 656);
}

TEST(MlaCacheSpec, TheFormatHasAName) {
  EXPECT_EQ(to_string(KvFormat::fp8_ds_mla), "fp8_ds_mla");
  EXPECT_EQ(parse_kv_format("fp8_ds_mla"), KvFormat::fp8_ds_mla);
  EXPECT_EQ(stored_dtype(KvFormat::fp8_ds_mla, DType::bf16), DType::u8);
  EXPECT_EQ(stored_dtype(KvFormat::int8_level1, DType::bf16), DType::i8);
  EXPECT_EQ(stored_dtype(KvFormat::plain, DType::fp8_e5m2), DType::fp8_e5m2);
}

TEST(MlaCacheSpec, RefusesWhatARowCannotHold) {
  const auto with = [](KvCacheSpec s, const std::function<void(KvCacheSpec&)>& change) {
    change(s);
    return refusal([&] { mla_cache_shape(s); });
  };
  EXPECT_EQ(with(ds(), [](auto&) {}), "none");
  EXPECT_EQ(with(ds(), [](auto& s) { s.head_size = 320; }), "KvCacheSpec::validate: head_size");
  EXPECT_EQ(with(ds(), [](auto& s) { s.num_kv_heads = 2; }), "KvCacheSpec::validate: num_kv_heads");
  EXPECT_EQ(with(ds(), [](auto& s) { s.dtype = DType::bf16; }), "KvCacheSpec::validate: dtype");
  EXPECT_EQ(with(ds(), [](auto& s) { s.dtype = DType::i8; }), "KvCacheSpec::validate: dtype");
  EXPECT_EQ(with(ds(), [](auto& s) { s.num_blocks = std::int64_t{1} << 56; }),
            "KvCacheSpec::validate: num_blocks");
  EXPECT_EQ(with(plain(), [](auto& s) { s.num_kv_heads = 2; }), "mla_cache_shape: num_kv_heads");
  const auto int8 = [](auto& s) {
    s.format = KvFormat::int8_per_token_head;
    s.dtype = DType::i8;
  };
  EXPECT_EQ(with(plain(), int8), "mla_cache_shape: format");
}

TEST(MlaCacheSpec, CachesOfKeysAndValuesRefuseTheFormat) {
  EXPECT_EQ(refusal([] { flash_attn_cache_shape(ds()); }), "flash_attn_cache_shape: format");
  EXPECT_EQ(refusal([] { flash_attn_scale_shape(ds()); }), "flash_attn_scale_shape: format");
  EXPECT_EQ(refusal([] { flash_attn_stride_order(KvLayout::nhd, false, KvFormat::fp8_ds_mla); }),
            "flash_attn_stride_order: format");
}

}  // namespace
}  // namespace attend
