// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "backend/fake_backend.h"
#include "backends/common/kv_cache_dtype.h"

namespace attend {
namespace {

using testing::plain_config;

TEST(AttentionType, EveryNameParsesBack) {
  for (const auto type : {AttentionType::decoder, AttentionType::encoder,
                          AttentionType::encoder_only, AttentionType::encoder_decoder}) {
    EXPECT_EQ(parse_attention_type(to_string(type)), type);
  }
  EXPECT_EQ(to_string(AttentionType::encoder_only), "encoder_only");
  EXPECT_FALSE(parse_attention_type("Decoder"));
  EXPECT_FALSE(parse_attention_type(""));
}

TEST(Describe, NamesValuesAndOnlyTheFlagsThatAreSet) {
  AttentionConfig config = plain_config("cuda:9.0");
  EXPECT_EQ(describe(config),
            "platform=cuda:9.0, head_size=128, dtype=bf16, kv_cache_dtype=auto, block_size=any, "
            "attn_type=decoder");
  config.block_size = 32;
  config.use_mla = config.has_sink = config.use_sparse = config.use_mm_prefix = true;
  config.use_differential = true;
  config.use_per_head_quant_scales = config.use_non_causal = config.use_alibi_sqrt = true;
  config.batch_invariant = config.use_kv_connector = true;
  EXPECT_EQ(describe(config),
            "platform=cuda:9.0, head_size=128, dtype=bf16, kv_cache_dtype=auto, block_size=32, "
            "attn_type=decoder, use_mla, has_sink, use_sparse, use_differential, "
            "use_mm_prefix, "
            "use_per_head_quant_scales, use_non_causal, use_alibi_sqrt, batch_invariant, "
            "use_kv_connector");
}

TEST(KvCacheDtype, HasOneSpelling) {
  EXPECT_EQ(canonical_kv_cache_dtype("bfloat16"), "bf16");
  EXPECT_EQ(canonical_kv_cache_dtype(""), "auto");
  EXPECT_EQ(canonical_kv_cache_dtype("auto"), "auto");
  EXPECT_EQ(canonical_kv_cache_dtype("fp8_ds_mla"), "fp8_ds_mla");
}

TEST(KvCacheDtype, AutoIsTheComputeType) {
  const auto plain = [](DType t) { return StoredKv{t, KvFormat::plain}; };
  EXPECT_EQ(resolve_kv_cache_dtype("auto", DType::f16), plain(DType::f16));
  EXPECT_EQ(resolve_kv_cache_dtype("bf16", DType::f16), plain(DType::bf16));
  EXPECT_EQ(resolve_kv_cache_dtype("nvfp4_ds_mla", DType::f16), std::nullopt);
}

TEST(KvCacheDtype, AFormatStoresCodesOrBytes) {
  EXPECT_EQ(resolve_kv_cache_dtype("int8_level2", DType::f16),
            (StoredKv{DType::i8, KvFormat::int8_level2}));
  EXPECT_EQ(resolve_kv_cache_dtype("fp8_ds_mla", DType::bf16),
            (StoredKv{DType::u8, KvFormat::fp8_ds_mla}));
  EXPECT_EQ(resolve_kv_cache_dtype("plain", DType::f16), std::nullopt);
}

}  // namespace
}  // namespace attend
