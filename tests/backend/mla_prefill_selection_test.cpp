// SPDX-License-Identifier: Apache-2.0
// What the registry and the selector of this build answer about MLA prefill.
#include <gmock/gmock.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "attend/backend/mla_prefill.h"
#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;

MlaPrefillConfig deepseek(std::string_view platform = "cpu") {
  MlaPrefillConfig config;
  config.platform = Platform::parse(platform);
  config.dims = {512, 128, 64, 128};
  return config;
}

std::vector<std::string> reasons(std::string_view name, const MlaPrefillConfig& config) {
  return find_mla_prefill_backend(name).validate_configuration(config);
}

TEST(MlaPrefillRegistry, ListsByNameAndFindsEach) {
  const auto all = mla_prefill_backends();
  ASSERT_EQ(all.size(), 2U);
  EXPECT_TRUE(std::is_sorted(all.begin(), all.end(),
                             [](auto* a, auto* b) { return a->name() < b->name(); }));
  for (const MlaPrefillBackend* b : all) EXPECT_EQ(&find_mla_prefill_backend(b->name()), b);
}

TEST(MlaPrefillRegistry, UnknownNameListsTheValidOnes) {
  try {
    find_mla_prefill_backend("FLASHINFER");
    FAIL() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "name");
    EXPECT_THAT(e.what(), HasSubstr("one of FLASH_ATTN, ROCM_AITER_FA"));
    EXPECT_THAT(e.what(), HasSubstr("'FLASHINFER'"));
  }
}

TEST(MlaPrefillSelection, FlashAttnOnTheCpuAndOnCudaWithTheReasonsAgainstTheOther) {
  const MlaPrefillSelection cpu = select_mla_prefill(deepseek());
  ASSERT_NE(cpu.backend, nullptr);
  EXPECT_EQ(cpu.backend->name(), "FLASH_ATTN");
  EXPECT_THAT(cpu.also_valid, IsEmpty());
  EXPECT_THAT(cpu.rejected,
              ElementsAre(Pair("ROCM_AITER_FA",
                               ElementsAre("platform not supported: cpu (chosen automatically on "
                                           "rocm only; elsewhere ask for it by name)"))));
  for (const char* platform : {"cuda:8.0", "cuda:9.0", "cuda:10.0"}) {
    const MlaPrefillSelection cuda = select_mla_prefill(deepseek(platform));
    ASSERT_NE(cuda.backend, nullptr) << platform;
    EXPECT_EQ(cuda.backend->name(), "FLASH_ATTN");
    ASSERT_EQ(cuda.rejected.size(), 1U);
    EXPECT_THAT(cuda.rejected[0].second,
                ElementsAre(HasSubstr("required dependencies not available: cuda"),
                            HasSubstr("platform not supported: cuda")));
  }
}

TEST(MlaPrefillSelection, AiterOnItsTwoArchitecturesOnly) {
  for (const char* platform : {"rocm:gfx942", "rocm:gfx950"}) {
    const MlaPrefillSelection s = select_mla_prefill(deepseek(platform));
    ASSERT_NE(s.backend, nullptr) << platform;
    EXPECT_EQ(s.backend->name(), "ROCM_AITER_FA");
    EXPECT_THAT(s.also_valid, ElementsAre("FLASH_ATTN"));
    EXPECT_THAT(s.rejected, IsEmpty());
  }
  const MlaPrefillSelection older = select_mla_prefill(deepseek("rocm:gfx90a"));
  ASSERT_NE(older.backend, nullptr);
  EXPECT_EQ(older.backend->name(), "FLASH_ATTN");
  EXPECT_THAT(older.rejected,
              ElementsAre(Pair("ROCM_AITER_FA",
                               ElementsAre("compute capability not supported: gfx90a (must be "
                                           "gfx942 or gfx950)"))));
}

TEST(MlaPrefillSelection, AReasonAgainstTheFirstMakesTheSecondTheChoice) {
  MlaPrefillConfig config = deepseek("rocm:gfx942");
  config.batch_invariant = true;
  const MlaPrefillSelection s = select_mla_prefill(config);
  ASSERT_NE(s.backend, nullptr);
  EXPECT_EQ(s.backend->name(), "FLASH_ATTN");
  EXPECT_THAT(s.rejected,
              ElementsAre(Pair("ROCM_AITER_FA", ElementsAre("batch invariance not supported"))));
}

TEST(MlaPrefillSelection, ByNameOnlyThatOneIsAskedAndItsListOfDevicesIsNot) {
  const MlaPrefillSelection s = select_mla_prefill(deepseek(), "ROCM_AITER_FA");
  EXPECT_EQ(s.backend, &find_mla_prefill_backend("ROCM_AITER_FA"));
  EXPECT_THAT(s.rejected, IsEmpty());
  EXPECT_THAT(s.also_valid, IsEmpty());
  EXPECT_EQ(&require_mla_prefill(deepseek(), "ROCM_AITER_FA"), s.backend);
  EXPECT_EQ(&require_mla_prefill(deepseek()), &find_mla_prefill_backend("FLASH_ATTN"));
  EXPECT_THROW(select_mla_prefill(deepseek(), "auto"), InvalidArgument);
  EXPECT_THROW(require_mla_prefill(deepseek(), "TRTLLM_RAGGED"), InvalidArgument);
}

TEST(MlaPrefillSelection, RequireThrowsEveryReasonOfEveryCandidate) {
  MlaPrefillConfig config = deepseek("rocm:gfx942");
  config.quant_output = true;
  try {
    require_mla_prefill(config);
    FAIL() << "no exception";
  } catch (const Unsupported& e) {
    EXPECT_EQ(e.reasons().size(), 2U);
    EXPECT_THAT(e.what(), HasSubstr("no valid MLA prefill back end for {platform=rocm:gfx942, "
                                    "dtype=bf16, kv_lora_rank=512, qk_nope_head_dim=128, "
                                    "qk_rope_head_dim=64, v_head_dim=128, quant_output}"));
    EXPECT_THAT(e.what(), HasSubstr("ROCM_AITER_FA: [fused quantised output not supported]"));
    EXPECT_THAT(e.what(), HasSubstr("FLASH_ATTN: [fused quantised output not supported: "
                                    "rocm:gfx942 (must be cpu)]"));
  }
}

TEST(MlaPrefillValidation, GivesAllReasonsInOrder) {
  MlaPrefillConfig config = deepseek("cuda:7.5");
  config.dtype = DType::f32;
  config.dims = {512, 128, 132, 128};
  config.batch_invariant = config.quant_output = true;
  const char* dims =
      "MLA dimensions not supported: kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=132, "
      "v_head_dim=128 (must be positive multiples of 8, heads of queries and values at most 256)";
  EXPECT_THAT(reasons("FLASH_ATTN", config),
              ElementsAre("compute capability not supported: 7.5 (must be at least 8.0)",
                          "dtype not supported: f32 on cuda:7.5 (must be f16 or bf16)", dims,
                          "fused quantised output not supported: cuda:7.5 (must be cpu)"));
  EXPECT_THAT(
      reasons("ROCM_AITER_FA", config),
      ElementsAre("dtype not supported: f32 on cuda:7.5 (must be f16 or bf16)",
                  "required dependencies not available: cuda:7.5", dims,
                  "batch invariance not supported", "fused quantised output not supported"));
  config.platform = Platform::parse("rocm:gfx1100");
  EXPECT_THAT(
      reasons("ROCM_AITER_FA", config),
      ElementsAre("compute capability not supported: gfx1100 (must be gfx942 or gfx950)",
                  "dtype not supported: f32 on rocm:gfx1100 (must be f16 or bf16)", dims,
                  "batch invariance not supported", "fused quantised output not supported"));
}

TEST(MlaPrefillValidation, DimensionsAreMultiplesOf8WithHeadsUpTo256) {
  constexpr int kMost = std::numeric_limits<int>::max();
  for (const MlaDims& dims :
       {MlaDims{512, 128, 64, 128}, MlaDims{256, 64, 64, 128}, MlaDims{256, 96, 64, 80},
        MlaDims{8, 8, 8, 8}, MlaDims{4096, 192, 64, 256}}) {
    MlaPrefillConfig config = deepseek();
    config.dims = dims;
    for (const MlaPrefillBackend* b : mla_prefill_backends())
      EXPECT_THAT(b->validate_configuration(config), IsEmpty()) << b->name();
  }
  for (const MlaDims& dims :
       {MlaDims{}, MlaDims{512, 128, 64, 0}, MlaDims{512, 128, 64, -8}, MlaDims{508, 128, 64, 128},
        MlaDims{512, 120, 68, 128}, MlaDims{512, 124, 68, 128}, MlaDims{512, 200, 64, 128},
        MlaDims{512, 128, 64, 264}, MlaDims{512, kMost - 7, kMost - 7, 128}}) {
    MlaPrefillConfig config = deepseek();
    config.dims = dims;
    for (const MlaPrefillBackend* b : mla_prefill_backends()) {
      EXPECT_THAT(b->validate_configuration(config),
                  ElementsAre(HasSubstr("MLA dimensions not supported: kv_lora_rank=")))
          << b->name() << " " << describe(config);
    }
  }
}

TEST(MlaPrefillPadding, IsWhereTheKernelsNeedIt) {
  const auto pads = [](std::string_view name, std::string_view platform) {
    return find_mla_prefill_backend(name).requires_v_padding(Platform::parse(platform));
  };
  for (const char* platform : {"cpu", "cuda:9.0", "cuda:10.0"})
    EXPECT_FALSE(pads("FLASH_ATTN", platform)) << platform;
  for (const char* platform : {"cuda:8.0", "cuda:8.9", "cuda:12.0", "rocm:gfx942"})
    EXPECT_TRUE(pads("FLASH_ATTN", platform)) << platform;
  for (const char* platform : {"cpu", "rocm:gfx942", "rocm:gfx950"})
    EXPECT_FALSE(pads("ROCM_AITER_FA", platform)) << platform;
}

TEST(MlaPrefillPadding, ValuesWiderThanKeysCannotBePadded) {
  MlaPrefillConfig config = deepseek("cuda:8.0");
  config.dims = {512, 64, 64, 192};
  EXPECT_THAT(reasons("FLASH_ATTN", config),
              ElementsAre("MLA dimensions not supported: v_head_dim 192 on cuda:8.0 (values are "
                          "padded to the 128 columns of keys there)"));
  config.platform = Platform::parse("cuda:9.0");
  EXPECT_THAT(reasons("FLASH_ATTN", config), IsEmpty());
}

MlaPrefillImplConfig impl_config(std::string_view platform = "cpu") {
  MlaPrefillImplConfig config;
  config.num_heads = 2;
  config.dims = {512, 128, 64, 128};
  config.platform = Platform::parse(platform);
  return config;
}

TEST(MlaPrefillImpl, HasTheValueColumnsOfItsPlatform) {
  const MlaPrefillBackend& flash = find_mla_prefill_backend("FLASH_ATTN");
  EXPECT_EQ(flash.make_impl(impl_config())->head_dim_v(), 128);
  EXPECT_EQ(flash.make_impl(impl_config("cuda:9.0"))->head_dim_v(), 128);
  EXPECT_EQ(flash.make_impl(impl_config("cuda:8.0"))->head_dim_v(), 192);
  EXPECT_EQ(flash.make_impl(impl_config("rocm:gfx942"))->head_dim_v(), 192);
  const MlaPrefillBackend& aiter = find_mla_prefill_backend("ROCM_AITER_FA");
  EXPECT_EQ(aiter.make_impl(impl_config("rocm:gfx942"))->head_dim_v(), 128);
  EXPECT_EQ(aiter.make_impl(impl_config())->head_dim_v(), 128);
}

struct BadField {
  const char* argument;
  std::function<void(MlaPrefillImplConfig&)> change;
};

TEST(MlaPrefillImpl, RefusesBadConfigsByName) {
  const std::vector<BadField> fields = {
      {"num_heads", [](auto& c) { c.num_heads = 0; }},
      {"num_heads", [](auto& c) { c.num_heads = -1; }},
      {"scale", [](auto& c) { c.scale = 0.0F; }},
      {"scale", [](auto& c) { c.scale = std::numeric_limits<float>::infinity(); }}};
  for (const MlaPrefillBackend* b : mla_prefill_backends()) {
    for (const BadField& field : fields) {
      MlaPrefillImplConfig config = impl_config();
      field.change(config);
      try {
        b->make_impl(config);
        ADD_FAILURE() << "no exception: " << field.argument;
      } catch (const InvalidArgument& e) {
        EXPECT_EQ(e.argument(), field.argument);
        EXPECT_EQ(e.op(), std::string(b->name()) + ".make_impl");
      }
    }
  }
}

TEST(MlaPrefillImpl, GivesTheReasonsOfWhatItCannotDo) {
  MlaPrefillImplConfig config = impl_config("rocm:gfx90a");
  config.dtype = DType::f32;
  try {
    find_mla_prefill_backend("ROCM_AITER_FA").make_impl(config);
    FAIL() << "no exception";
  } catch (const Unsupported& e) {
    EXPECT_THAT(e.what(), HasSubstr("MLA prefill back end ROCM_AITER_FA is not valid"));
    EXPECT_THAT(e.reasons(), ElementsAre(HasSubstr("gfx90a"), HasSubstr("f32")));
  }
}

}  // namespace
}  // namespace attend
