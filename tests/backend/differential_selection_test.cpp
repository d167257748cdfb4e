// SPDX-License-Identifier: Apache-2.0
// When DIFFERENTIAL_FLASH_ATTN is chosen, and what is said against it.
#include <gmock/gmock.h>

#include <algorithm>

#include "attend/backend/selector.h"
#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

AttentionConfig differential_config(const char* platform = "cpu") {
  AttentionConfig c;
  c.platform = Platform::parse(platform);
  c.head_size = 64;
  c.use_differential = true;
  return c;
}

std::vector<std::string> reasons(const AttentionConfig& c) {
  return find_backend("DIFFERENTIAL_FLASH_ATTN").validate_configuration(c);
}

TEST(DifferentialSelection, IsChosenForDifferentialModelsOnly) {
  for (const char* platform : {"cpu", "cuda:8.0", "cuda:9.0"}) {
    for (const char* stored : {"auto", "bfloat16", "fp8_e4m3", "fp8_e5m2", "fp8"}) {
      AttentionConfig c = differential_config(platform);
      c.kv_cache_dtype = stored;
      c.batch_invariant = true;
      const Selection s = select_backend(c);
      ASSERT_NE(s.backend, nullptr) << platform << stored;
      EXPECT_EQ(s.backend->name(), "DIFFERENTIAL_FLASH_ATTN");
      const auto flash =
          std::ranges::find(s.rejected, "FLASH_ATTN", [](const auto& r) { return r.first; });
      ASSERT_NE(flash, s.rejected.end());
      EXPECT_THAT(flash->second, ElementsAre("differential not supported"));
      c.use_differential = false;
      EXPECT_EQ(select_backend(c).backend->name(), "FLASH_ATTN");
      EXPECT_THAT(reasons(c), ElementsAre("non-differential not supported"));
    }
  }
  EXPECT_EQ(select_backend(differential_config("rocm:gfx942")).backend, nullptr);
  for (const char* mla : {"FLASH_ATTN_MLA", "FLASHMLA_SPARSE"})
    EXPECT_THAT(find_backend(mla).validate_configuration(differential_config()),
                ::testing::Contains("differential not supported"));
}

TEST(DifferentialSelection, HeadSizesAreTheMultiplesOf8) {
  AttentionConfig c = differential_config();
  for (c.head_size = 8; c.head_size <= 256; c.head_size += 8) EXPECT_THAT(reasons(c), IsEmpty());
  c.head_size = 264;
  EXPECT_THAT(reasons(c), ElementsAre("head_size not supported: 264 (must be a multiple of 8, at "
                                      "most 256)"));
}

TEST(DifferentialSelection, GivesEveryReason) {
  AttentionConfig c = differential_config("cuda:7.5");
  c.head_size = 100;
  c.dtype = DType::f32;
  c.kv_cache_dtype = "int8_level1";
  c.block_size = 8;
  c.use_differential = false;
  c.use_mla = c.use_sparse = c.use_mm_prefix = c.has_sink = true;
  c.attn_type = AttentionType::encoder;
  EXPECT_THAT(
      reasons(c),
      ElementsAre("head_size not supported: 100 (must be a multiple of 8, at most 256)",
                  "dtype not supported: f32 on cuda:7.5 (must be f16 or bf16)",
                  "kv_cache_dtype not supported: int8_level1 (must be auto, f16, bf16, "
                  "f32, fp8_e4m3 or fp8_e5m2)",
                  "block_size not supported: 8 (must be a multiple of 16)",
                  "partial multimodal token full attention not supported", "MLA not supported",
                  "sparse not supported", "non-differential not supported",
                  "compute capability not supported: 7.5 (must be at least 8.0)",
                  "attention type encoder not supported (must be decoder)",
                  "sink not supported on compute capability < 9.0"));
  c = differential_config();
  c.kv_cache_dtype = "f16";
  EXPECT_THAT(reasons(c), ElementsAre("kv_cache_dtype f16 differs from dtype bf16 (the cache "
                                      "stores keys as they are)"));
}

TEST(DifferentialSelection, CachesHaveTwoBranches) {
  const Backend& b = find_backend("DIFFERENTIAL_FLASH_ATTN");
  KvCacheSpec spec;
  spec.num_blocks = 7;
  spec.block_size = 32;
  spec.num_kv_heads = 20;
  spec.head_size = 64;
  EXPECT_THAT(b.kv_cache_shape(spec), ElementsAre(2, 2, 7, 32, 10, 64));
  EXPECT_EQ(b.kv_cache_block_dim(), 2);
  EXPECT_THAT(b.kv_scale_shape(spec), IsEmpty());
  EXPECT_THAT(b.kv_cache_stride_order(KvLayout::nhd, false, KvFormat::plain),
              ElementsAre(0, 1, 2, 3, 4, 5));
  spec.block_size = 24;
  EXPECT_THROW(b.kv_cache_shape(spec), InvalidArgument);
  spec.block_size = 32;
  spec.num_kv_heads = 5;
  EXPECT_THROW(b.kv_cache_shape(spec), InvalidArgument);
}

}  // namespace
}  // namespace attend
