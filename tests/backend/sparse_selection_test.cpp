// SPDX-License-Identifier: Apache-2.0
// When FLASHMLA_SPARSE is chosen, and what is said against it.
#include <gmock/gmock.h>

#include <algorithm>

#include "attend/backend/selector.h"
#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

AttentionConfig sparse_config(const char* platform = "cpu") {
  AttentionConfig c;
  c.platform = Platform::parse(platform);
  c.head_size = 576;
  c.use_mla = c.use_sparse = true;
  return c;
}

std::vector<std::string> reasons(const AttentionConfig& c) {
  return find_backend("FLASHMLA_SPARSE").validate_configuration(c);
}

TEST(SparseSelection, ServesSparseModelsOnly) {
  for (const char* stored : {"auto", "bfloat16", "fp8_ds_mla"}) {
    AttentionConfig c = sparse_config();
    c.kv_cache_dtype = stored;
    c.block_size = 64;
    const Selection s = select_backend(c);
    ASSERT_NE(s.backend, nullptr) << stored;
    EXPECT_EQ(s.backend->name(), "FLASHMLA_SPARSE");
    const auto dense =
        std::ranges::find(s.rejected, "FLASH_ATTN_MLA", [](const auto& r) { return r.first; });
    ASSERT_NE(dense, s.rejected.end());
    EXPECT_THAT(dense->second, ElementsAre("sparse not supported"));
  }
  AttentionConfig dense = sparse_config();
  dense.use_sparse = false;
  EXPECT_EQ(select_backend(dense).backend->name(), "FLASH_ATTN_MLA");
  EXPECT_THAT(reasons(dense), ElementsAre("non-sparse not supported"));
}

TEST(SparseSelection, GivesEveryReason) {
  AttentionConfig c = sparse_config("cuda:8.9");
  c.head_size = 320;
  c.dtype = DType::f16;
  c.kv_cache_dtype = "fp8";
  c.block_size = 16;
  c.use_mla = c.use_sparse = false;
  c.has_sink = c.use_alibi_sqrt = c.use_non_causal = c.use_mm_prefix = true;
  c.use_per_head_quant_scales = true;
  c.attn_type = AttentionType::encoder;
  EXPECT_THAT(
      reasons(c),
      ElementsAre("head_size not supported: 320 (must be 576)",
                  "dtype not supported: f16 (must be bf16)",
                  "kv_cache_dtype not supported: fp8 (must be auto, bf16 or fp8_ds_mla)",
                  "block_size not supported: 16 (must be a multiple of 64)",
                  "partial multimodal token full attention not supported", "non-MLA not supported",
                  "attention sinks not supported", "square-root ALiBi not supported",
                  "non-sparse not supported", "per-head quant scales not supported",
                  "compute capability not supported: 8.9 (must be at least 9.0)",
                  "attention type encoder not supported (must be decoder)",
                  "non-causal attention not supported"));
}

TEST(SparseSelection, IsChosenWhereItRuns) {
  EXPECT_THAT(reasons(sparse_config("cuda:9.0")), IsEmpty());
  EXPECT_EQ(select_backend(sparse_config("cuda:10.0")).backend->name(), "FLASHMLA_SPARSE");
  EXPECT_EQ(select_backend(sparse_config("rocm:gfx942")).backend, nullptr);
}

TEST(SparseSelection, CachesHaveTheShapeOfTheirRows) {
  const Backend& b = find_backend("FLASHMLA_SPARSE");
  KvCacheSpec spec;
  spec.num_blocks = 7;
  spec.block_size = 128;
  spec.num_kv_heads = 1;
  spec.head_size = 576;
  EXPECT_THAT(b.kv_cache_shape(spec), ElementsAre(7, 128, 576));
  spec.format = KvFormat::fp8_ds_mla;
  spec.dtype = DType::u8;
  EXPECT_THAT(b.kv_cache_shape(spec), ElementsAre(7, 128, 656));
  EXPECT_EQ(b.preferred_block_size(16), 64);
  spec.block_size = 16;
  EXPECT_THROW(b.kv_cache_shape(spec), InvalidArgument);
}

}  // namespace
}  // namespace attend
