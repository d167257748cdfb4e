// SPDX-License-Identifier: Apache-2.0
#include "serving/kv_memory.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "attend/backend/selector.h"

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
