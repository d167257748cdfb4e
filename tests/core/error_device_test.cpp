// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "attend/core/device.h"
#include "attend/core/error.h"
#include "attend/core/tensor_view.h"

namespace attend {
namespace {

TEST(ErrorTest, InvalidArgumentText) {
  const InvalidArgument e("merge", "lse", "dtype f32", "[2] i32 cpu:0");
  EXPECT_STREQ(e.what(), "[merge] argument 'lse': expected dtype f32, got [2] i32 cpu:0");
  EXPECT_EQ(e.op(), "merge");
  EXPECT_EQ(e.argument(), "lse");
}

TEST(ErrorTest, UnsupportedKeepsEveryReason) {
  const Unsupported e("FLASH_ATTN", {"head size", "dtype"});
  EXPECT_STREQ(e.what(), "FLASH_ATTN: head size; dtype");
  EXPECT_THAT(e.reasons(), ::testing::ElementsAre("head size", "dtype"));
}

TEST(ErrorTest, OutOfBlocksNamesBothSizes) {
  const OutOfBlocks e(12, 8, "request 3");
  EXPECT_THAT(e.what(), ::testing::AllOf(::testing::HasSubstr("request 3"),
                                         ::testing::HasSubstr("12"), ::testing::HasSubstr("8")));
  EXPECT_EQ(e.needed(), 12);
  EXPECT_EQ(e.capacity(), 8);
}

TEST(PlatformTest, RoundTrips) {
  for (const char* text : {"cpu", "cuda:9.0", "cuda:10.3", "rocm:gfx942", "rocm:gfx90a"}) {
    EXPECT_EQ(to_string(Platform::parse(text)), text);
  }
  EXPECT_EQ(Platform::parse("cuda:9.0").capability(), 90);
  EXPECT_EQ(Platform::parse("cpu").capability(), 0);
  EXPECT_EQ(Platform::parse("rocm:gfx942").arch, "gfx942");
}

TEST(PlatformTest, RefusesOtherTexts) {
  for (const char* text : {"", "CPU", "cpu:0", "cuda", "cuda:", "cuda:9", "cuda:9.", "cuda:.0",
                           "cuda:9.0 ", "cuda:9.10", "cuda:-9.0", "cuda:0.0", "cuda:+9.0", "rocm",
                           "rocm:", "rocm:gfx", "rocm:942", "rocm:gfx94Z", "tpu"}) {
    EXPECT_THROW(Platform::parse(text), InvalidArgument) << text;
  }
}

TEST(TensorViewTest, Describe) {
  EXPECT_EQ(describe(TensorView(nullptr, DType::bf16, {4, 8, 128})), "[4, 8, 128] bf16 cpu:0");
  TensorView t(nullptr, DType::i32, std::initializer_list<std::int64_t>{});
  t.device = {DeviceType::cuda, 1};
  EXPECT_EQ(describe(t), "[] i32 cuda:1");
}

TEST(TensorViewTest, PermuteSelectSlice) {
  std::vector<float> data(2 * 3 * 4);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  const TensorView t(data.data(), DType::f32, {2, 3, 4});
  EXPECT_TRUE(t.is_contiguous());
  const TensorView p = t.permute({2, 0, 1});
  EXPECT_FALSE(p.is_contiguous());
  EXPECT_EQ(p.shape[0], 4);
  EXPECT_EQ(p.strides[0], 1);
  const TensorView s = t.select(1, 2);
  EXPECT_EQ(s.rank, 2);
  EXPECT_EQ(*s.as<float>(), 8.0F);
  EXPECT_EQ(s.strides[0], 12);
  const TensorView c = t.slice(2, 1, 2);
  EXPECT_EQ(*c.as<float>(), 1.0F);
  EXPECT_EQ(c.numel(), 12);
  EXPECT_FALSE(c.is_contiguous());
}

}  // namespace
}  // namespace attend
