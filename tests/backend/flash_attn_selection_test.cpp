// SPDX-License-Identifier: Apache-2.0
// What the selector of this build answers about FLASH_ATTN.
#include <gmock/gmock.h>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "backend/fake_backend.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::plain_config;
using ::testing::StartsWith;

std::vector<std::string> reasons_against_flash_attn(const Selection& s) {
  for (const auto& [name, reasons] : s.rejected) {
    if (name == "FLASH_ATTN") return reasons;
  }
  return {};
}

TEST(FlashAttnSelection, IsChosenOnCpuAndOnCuda) {
  for (const char* platform : {"cpu", "cuda:9.0", "cuda:8.0"}) {
    const Selection s = select_backend(plain_config(platform));
    ASSERT_NE(s.backend, nullptr) << platform;
    EXPECT_EQ(s.backend->name(), "FLASH_ATTN");
    EXPECT_THAT(reasons_against_flash_attn(s), IsEmpty());
  }
}

TEST(FlashAttnSelection, TuringIsTooOld) {
  const Selection s = select_backend(plain_config("cuda:7.5"));
  EXPECT_EQ(s.backend, nullptr);
  EXPECT_THAT(reasons_against_flash_attn(s),
              ElementsAre("compute capability not supported: 7.5 (must be at least 8.0)"));
}

TEST(FlashAttnSelection, OnRocmOnlyByName) {
  const AttentionConfig config = plain_config("rocm:gfx942");
  const Selection s = select_backend(config);
  EXPECT_EQ(s.backend, nullptr);
  EXPECT_THAT(reasons_against_flash_attn(s),
              ElementsAre(StartsWith("platform not supported: rocm:gfx942")));
  EXPECT_EQ(select_backend(config, "FLASH_ATTN").backend, &find_backend("FLASH_ATTN"));
}

TEST(FlashAttnSelection, Float32OnTheCpuOnly) {
  AttentionConfig config = plain_config("cpu");
  config.dtype = DType::f32;
  EXPECT_NE(select_backend(config).backend, nullptr);
  config.platform = Platform::parse("cuda:9.0");
  EXPECT_THAT(reasons_against_flash_attn(select_backend(config)),
              ElementsAre("dtype not supported: f32 on cuda:9.0 (must be f16 or bf16)"));
}

TEST(FlashAttnSelection, ServesTheTypesAndModesThatItHas) {
  AttentionConfig config = plain_config();
  config.use_non_causal = config.batch_invariant = config.use_kv_connector = true;
  config.block_size = 48;
  config.head_size = 8;
  for (const auto type : {AttentionType::decoder, AttentionType::encoder,
                          AttentionType::encoder_only, AttentionType::encoder_decoder}) {
    config.attn_type = type;
    EXPECT_NE(select_backend(config).backend, nullptr) << to_string(type);
  }
}

TEST(FlashAttnSelection, GivesAllReasonsInOrder) {
  AttentionConfig config = plain_config("cuda:7.0");
  config.head_size = 260;
  config.kv_cache_dtype = "int8";
  config.block_size = 8;
  config.use_mla = config.has_sink = config.use_sparse = config.use_alibi_sqrt = true;
  config.use_per_head_quant_scales = config.use_mm_prefix = true;
  EXPECT_THAT(
      reasons_against_flash_attn(select_backend(config)),
      ElementsAre("head_size not supported: 260 (must be a multiple of 8, at most 256)",
                  "kv_cache_dtype not supported: int8 (must be auto, f16, bf16, f32, fp8_e4m3, "
                  "fp8_e5m2, int8_level1, int8_level2 or int8_per_token_head)",
                  "block_size not supported: 8 (must be a multiple of 16)",
                  "partial multimodal token full attention not supported", "MLA not supported",
                  "sparse not supported",
                  "compute capability not supported: 7.0 (must be at least 8.0)",
                  "sink not supported on compute capability < 9.0"));
}

TEST(FlashAttnSelection, LatentsAreRefusedByTheirFormatAlone) {
  AttentionConfig config = plain_config();
  config.kv_cache_dtype = "fp8_ds_mla";
  EXPECT_THAT(reasons_against_flash_attn(select_backend(config)),
              ElementsAre("kv_cache_dtype not supported: fp8_ds_mla (must be auto, f16, bf16, f32, "
                          "fp8_e4m3, fp8_e5m2, int8_level1, int8_level2 or int8_per_token_head)"));
}

TEST(FlashAttnSelection, SinksAndSqrtAlibiAreSupported) {
  for (const char* platform : {"cpu", "cuda:9.0"}) {
    AttentionConfig config = plain_config(platform);
    config.has_sink = config.use_alibi_sqrt = true;
    EXPECT_NE(select_backend(config).backend, nullptr) << platform;
  }
  AttentionConfig config = plain_config("cuda:8.0");
  config.has_sink = true;
  config.kv_cache_dtype = "f16";
  EXPECT_THAT(reasons_against_flash_attn(select_backend(config)),
              ElementsAre("sink not supported on compute capability < 9.0; kv_cache_dtype f16 "
                          "differs from dtype bf16 (the cache stores keys as they are)"));
}

TEST(FlashAttnSelection, Fp8CachesAreForDecodersAndCrossAttention) {
  AttentionConfig config = plain_config();
  config.use_per_head_quant_scales = true;
  for (const char* name : {"fp8", "fp8_e4m3", "fp8_e5m2"}) {
    config.kv_cache_dtype = name;
    for (const auto type : {AttentionType::decoder, AttentionType::encoder_decoder}) {
      config.attn_type = type;
      EXPECT_NE(select_backend(config).backend, nullptr) << name << " " << to_string(type);
    }
    for (const auto type : {AttentionType::encoder, AttentionType::encoder_only}) {
      config.attn_type = type;
      EXPECT_THAT(reasons_against_flash_attn(select_backend(config)),
                  ElementsAre("quantization is not supported for encoder attention"));
    }
  }
}

TEST(FlashAttnSelection, CacheMustHaveTheComputeType) {
  AttentionConfig config = plain_config();
  config.kv_cache_dtype = "float16";
  EXPECT_THAT(reasons_against_flash_attn(select_backend(config)),
              ElementsAre("kv_cache_dtype f16 differs from dtype bf16 (the cache stores keys as "
                          "they are)"));
  config.dtype = DType::f16;
  EXPECT_NE(select_backend(config).backend, nullptr);
}

TEST(ExplicitChoice, ValidatesOnlyThatOne) {
  AttentionConfig config = plain_config();
  config.head_size = 100;
  const Selection s = select_backend(config, "FLASH_ATTN");
  EXPECT_EQ(s.backend, nullptr);
  ASSERT_EQ(s.rejected.size(), 1U);
  EXPECT_EQ(s.rejected[0].first, "FLASH_ATTN");
  EXPECT_THAT(s.also_valid, IsEmpty());
}

TEST(ExplicitChoice, UnknownNameIsAnError) {
  EXPECT_THROW(select_backend(plain_config(), "FLASHINFER"), InvalidArgument);
  EXPECT_THROW(select_backend(plain_config(), "auto"), InvalidArgument);
  EXPECT_THROW(require_backend(plain_config(), "FLASHINFER"), InvalidArgument);
}

TEST(RequireBackend, ReturnsTheChoice) {
  EXPECT_EQ(&require_backend(plain_config()), &find_backend("FLASH_ATTN"));
  EXPECT_EQ(&require_backend(plain_config("rocm:gfx942"), "FLASH_ATTN"),
            &find_backend("FLASH_ATTN"));
}

TEST(RequireBackend, ThrowsEveryReasonOfEveryCandidate) {
  AttentionConfig config = plain_config();
  config.head_size = 100;
  config.use_sparse = true;
  try {
    require_backend(config);
    FAIL() << "no exception";
  } catch (const Unsupported& e) {
    EXPECT_EQ(e.reasons().size(), backends().size());
    EXPECT_THAT(e.what(), HasSubstr("head_size=100"));
    EXPECT_THAT(e.what(), HasSubstr("FLASH_ATTN: [head_size not supported: 100 (must be a multiple "
                                    "of 8, at most 256), sparse not supported]"));
  }
  try {
    require_backend(config, "FLASH_ATTN");
    FAIL() << "no exception";
  } catch (const Unsupported& e) {
    EXPECT_THAT(e.what(), StartsWith("back end FLASH_ATTN is not valid for {platform=cpu"));
    EXPECT_EQ(e.reasons().size(), 1U);
  }
}

}  // namespace
}  // namespace attend
