// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <functional>

#include "backend/fake_backend.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using testing::FakeBackend;
using ::testing::IsEmpty;
using testing::plain_config;

/// Limits everything that a capability can limit.
Capability strict() {
  Capability can;
  can.dtypes = {DType::f16, DType::bf16, DType::f32};
  can.cpu_only_dtypes = {DType::f32};
  can.kv_cache_dtypes = {"auto", "bf16"};
  can.head_size_multiple = 8;
  can.max_head_size = 256;
  can.block_sizes = {16, 40};
  can.min_cuda_capability = 80;
  can.supports_kv_connector = false;
  return can;
}

struct OneReason {
  const char* label;
  std::function<void(AttentionConfig&)> change;
  const char* reason;
};
void PrintTo(const OneReason& r, std::ostream* os) { *os << r.label; }

class EachReason : public ::testing::TestWithParam<OneReason> {};

TEST_P(EachReason, ComesAlone) {
  const FakeBackend backend("FAKE", strict());
  AttentionConfig config = plain_config("cuda:9.0");
  ASSERT_THAT(backend.validate_configuration(config), IsEmpty());
  GetParam().change(config);
  EXPECT_THAT(backend.validate_configuration(config), ElementsAre(GetParam().reason));
}

INSTANTIATE_TEST_SUITE_P(
    Reasons, EachReason,
    ::testing::Values(
        OneReason{"head_size", [](auto& c) { c.head_size = 100; },
                  "head_size not supported: 100 (must be a multiple of 8, at most 256)"},
        OneReason{"head_size_too_large", [](auto& c) { c.head_size = 264; },
                  "head_size not supported: 264 (must be a multiple of 8, at most 256)"},
        OneReason{"head_size_zero", [](auto& c) { c.head_size = 0; },
                  "head_size not supported: 0 (must be a multiple of 8, at most 256)"},
        OneReason{"head_size_negative", [](auto& c) { c.head_size = -8; },
                  "head_size not supported: -8 (must be a multiple of 8, at most 256)"},
        OneReason{"dtype", [](auto& c) { c.dtype = DType::i8; },
                  "dtype not supported: i8 (must be f16 or bf16)"},
        OneReason{"dtype_of_the_cpu", [](auto& c) { c.dtype = DType::f32; },
                  "dtype not supported: f32 on cuda:9.0 (must be f16 or bf16)"},
        OneReason{"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "fp8"; },
                  "kv_cache_dtype not supported: fp8 (must be auto or bf16)"},
        OneReason{"block_size", [](auto& c) { c.block_size = 24; },
                  "block_size not supported: 24 (must be a multiple of 16 or 40)"},
        OneReason{"block_size_zero", [](auto& c) { c.block_size = 0; },
                  "block_size not supported: 0 (must be a multiple of 16 or 40)"},
        OneReason{"mm_prefix", [](auto& c) { c.use_mm_prefix = true; },
                  "partial multimodal token full attention not supported"},
        OneReason{"mla", [](auto& c) { c.use_mla = true; }, "MLA not supported"},
        OneReason{"sink", [](auto& c) { c.has_sink = true; }, "attention sinks not supported"},
        OneReason{"alibi_sqrt", [](auto& c) { c.use_alibi_sqrt = true; },
                  "square-root ALiBi not supported"},
        OneReason{"sparse", [](auto& c) { c.use_sparse = true; }, "sparse not supported"},
        OneReason{"differential", [](auto& c) { c.use_differential = true; },
                  "differential not supported"},
        OneReason{"per_head_quant_scales", [](auto& c) { c.use_per_head_quant_scales = true; },
                  "per-head quant scales not supported"},
        OneReason{"capability", [](auto& c) { c.platform = Platform::parse("cuda:7.5"); },
                  "compute capability not supported: 7.5 (must be at least 8.0)"},
        OneReason{"attn_type", [](auto& c) { c.attn_type = AttentionType::encoder_decoder; },
                  "attention type encoder_decoder not supported (must be decoder)"},
        OneReason{"non_causal", [](auto& c) { c.use_non_causal = true; },
                  "non-causal attention not supported"},
        OneReason{"batch_invariant", [](auto& c) { c.batch_invariant = true; },
                  "batch invariance not supported"},
        OneReason{"kv_connector", [](auto& c) { c.use_kv_connector = true; },
                  "KV connector not supported"}),
    [](const auto& info) { return std::string(info.param.label); });

TEST(ValidateConfiguration, GivesEveryReasonInTheFixedOrder) {
  const FakeBackend backend("FAKE", strict(), "these do not go together");
  AttentionConfig config;
  config.platform = Platform::parse("cuda:7.5");
  config.head_size = 100;
  config.dtype = DType::f32;
  config.kv_cache_dtype = "int8";
  config.block_size = 8;
  config.attn_type = AttentionType::encoder;
  config.use_mla = config.has_sink = config.use_sparse = config.use_mm_prefix = true;
  config.use_per_head_quant_scales = config.use_non_causal = config.use_alibi_sqrt = true;
  config.batch_invariant = config.use_kv_connector = config.use_differential = true;
  EXPECT_THAT(backend.validate_configuration(config),
              ElementsAre("head_size not supported: 100 (must be a multiple of 8, at most 256)",
                          "dtype not supported: f32 on cuda:7.5 (must be f16 or bf16)",
                          "kv_cache_dtype not supported: int8 (must be auto or bf16)",
                          "block_size not supported: 8 (must be a multiple of 16 or 40)",
                          "partial multimodal token full attention not supported",
                          "MLA not supported", "attention sinks not supported",
                          "square-root ALiBi not supported", "sparse not supported",
                          "differential not supported", "per-head quant scales not supported",
                          "compute capability not supported: 7.5 (must be at least 8.0)",
                          "attention type encoder not supported (must be decoder)",
                          "non-causal attention not supported", "batch invariance not supported",
                          "KV connector not supported", "these do not go together"));
}

TEST(ValidateConfiguration, AsksForWhatABackendInsistsOn) {
  Capability can;
  can.is_mla = can.is_sparse = can.is_differential = true;
  const FakeBackend backend("FAKE", can);
  AttentionConfig config = plain_config();
  EXPECT_THAT(backend.validate_configuration(config),
              ElementsAre("non-MLA not supported", "non-sparse not supported",
                          "non-differential not supported"));
  config.use_mla = config.use_sparse = config.use_differential = true;
  EXPECT_THAT(backend.validate_configuration(config), IsEmpty());
}

TEST(ValidateConfiguration, EmptyListsMeanAny) {
  const FakeBackend backend("FAKE");
  AttentionConfig config = plain_config("cuda:1.0");
  config.head_size = 77;
  config.dtype = DType::i8;
  config.kv_cache_dtype = "packed_656";
  config.block_size = 3;
  EXPECT_THAT(backend.validate_configuration(config), IsEmpty());
  config.block_size = -3;
  config.head_size = 0;
  EXPECT_THAT(backend.validate_configuration(config),
              ElementsAre("head_size not supported: 0 (must be a positive multiple of 1)",
                          "block_size not supported: -3 (must be positive)"));
}

TEST(ValidateConfiguration, ListedHeadSizesAreTheOnlyOnes) {
  Capability can;
  can.head_sizes = {64, 576};
  const FakeBackend backend("FAKE", can);
  AttentionConfig config = plain_config();
  EXPECT_THAT(backend.validate_configuration(config),
              ElementsAre("head_size not supported: 128 (must be 64 or 576)"));
  config.head_size = 576;
  EXPECT_THAT(backend.validate_configuration(config), IsEmpty());
}

TEST(ValidateConfiguration, CpuServesItsOwnDtypesAndHasNoCapability) {
  const FakeBackend backend("FAKE", strict());
  AttentionConfig config = plain_config("cpu");
  config.dtype = DType::f32;
  EXPECT_THAT(backend.validate_configuration(config), IsEmpty());
  config.dtype = DType::i32;
  EXPECT_THAT(backend.validate_configuration(config),
              ElementsAre("dtype not supported: i32 (must be f16, bf16 or f32)"));
}

TEST(ValidateConfiguration, KvCacheDtypeHasManySpellings) {
  const FakeBackend backend("FAKE", strict());
  AttentionConfig config = plain_config();
  for (const char* name : {"auto", "bf16", "bfloat16", ""}) {
    config.kv_cache_dtype = name;
    EXPECT_THAT(backend.validate_configuration(config), IsEmpty()) << name;
  }
}

TEST(PreferredBlockSize, KeepsASupportedOneElseTakesTheSmallest) {
  const FakeBackend limited("FAKE", strict());
  EXPECT_EQ(limited.preferred_block_size(80), 80);
  EXPECT_EQ(limited.preferred_block_size(17), 16);
  EXPECT_EQ(limited.preferred_block_size(0), 16);
  EXPECT_EQ(limited.preferred_block_size(-16), 16);
  const FakeBackend any("FAKE");
  EXPECT_EQ(any.preferred_block_size(17), 17);
  EXPECT_EQ(any.preferred_block_size(-1), 1);
}

}  // namespace
}  // namespace attend
