// SPDX-License-Identifier: Apache-2.0
#include "serving/kv_memory.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/core/huge_pages.h"
#include "core/affinity.h"

namespace attend::serving {
namespace {

using ::testing::ElementsAre;

KvCacheSpec spec_of(KvFormat format) {
  KvCacheSpec spec;
  spec.num_blocks = 3;
  spec.num_kv_heads = 2;
  spec.head_size = 8;
  spec.format = format;
  spec.dtype = format == KvFormat::plain ? DType::bf16 : DType::i8;
  return spec;
}

KvMemory memory_of(KvFormat format) {
  return KvMemory(find_backend("FLASH_ATTN"), spec_of(format), 2, KvLayout::hnd,
                  default_executor());
}

TEST(KvMemory, CachesOfCodesHaveScalesThatStartAsNaN) {
  for (const KvFormat format :
       {KvFormat::int8_level1, KvFormat::int8_level2, KvFormat::int8_per_token_head}) {
    SCOPED_TRACE(to_string(format));
    const KvMemory memory = memory_of(format);
    for (int layer = 0; layer < 2; ++layer) {
      const TensorView scales = memory.scales(layer);
      ASSERT_TRUE(scales.defined());
      EXPECT_EQ(scales.dtype, DType::f32);
      const std::span all(scales.as<float>(), static_cast<std::size_t>(scales.numel()));
      EXPECT_TRUE(std::all_of(all.begin(), all.end(), [](float x) { return std::isnan(x); }));
      std::fill(all.begin(), all.end(), 1.0F);  // a layer has its own
    }
  }
  const auto shape = [](KvFormat format) {
    const KvMemory memory = memory_of(format);
    const TensorView s = memory.scales(1);
    return std::vector<std::int64_t>(s.shape.begin(), s.shape.begin() + s.rank);
  };
  EXPECT_THAT(shape(KvFormat::int8_level1), ElementsAre(3, 2, 16));
  EXPECT_THAT(shape(KvFormat::int8_per_token_head), ElementsAre(2, 3, 16, 2));
}

TEST(KvMemory, OtherCachesHaveNoScales) {
  const KvMemory plain = memory_of(KvFormat::plain);
  EXPECT_FALSE(plain.scales(0).defined());
  EXPECT_TRUE(plain.layer(1).defined());
  EXPECT_FALSE(KvMemory().layer(0).defined());
}

TEST(KvMemory, AddsUpWhatItUses) {
  MemoryUse use;
  memory_of(KvFormat::int8_level1).add_to(use);
  KvMemory().add_to(use);
  const std::int64_t layer =
      kv_layer_bytes(find_backend("FLASH_ATTN"), spec_of(KvFormat::int8_level1));
  EXPECT_EQ(use.bytes, 2 * layer);
  EXPECT_EQ(use.huge_page_bytes, 0);
  EXPECT_THAT(use.problems, ElementsAre(::testing::HasSubstr("smaller")));  // of both, once

  const std::vector<int> cpus = thread_cpus();
  if (cpus.size() < 2) return;
  const NumaTopology two = {{{0, {cpus[0]}, 1}, {1, {cpus[1]}, 1}}, ""};
  MemoryUse spread;
  for (int i = 0; i < 2; ++i)
    spread.add(CacheMemory(kHugePageBytes + 3, {.huge_pages = false, .topology = &two}));
  ASSERT_EQ(spread.nodes.size(), 2U);
  EXPECT_EQ(spread.nodes[0].bytes, 2 * kHugePageBytes);
  EXPECT_EQ(spread.nodes[1].bytes, 6U);
  EXPECT_TRUE(spread.problems.empty());
}

TEST(KvMemory, BytesOfALayerAreCodesValuesAndScales) {
  const Backend& backend = find_backend("FLASH_ATTN");
  const auto bytes = [&](KvFormat format) { return kv_layer_bytes(backend, spec_of(format)); };
  const int rows = 3 * 16 * 2;
  EXPECT_EQ(bytes(KvFormat::plain), rows * (2 * 8 * 2));
  EXPECT_EQ(bytes(KvFormat::int8_level1), rows * (2 * 8 + 4));
  EXPECT_EQ(bytes(KvFormat::int8_level2), rows * (3 * 8 + 4));
  EXPECT_EQ(bytes(KvFormat::int8_per_token_head), rows * (2 * 8 + 2 * 4));
}

}  // namespace
}  // namespace attend::serving
