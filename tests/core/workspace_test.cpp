// SPDX-License-Identifier: Apache-2.0
#include "attend/core/workspace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "attend/core/error.h"

namespace attend {
namespace {

class BufferTest : public ::testing::TestWithParam<std::size_t> {};

TEST_P(BufferTest, IsAlignedZeroedAndWritableToTheEnd) {
  const std::size_t bytes = GetParam();
  const Buffer b(bytes);
  EXPECT_EQ(b.size(), bytes);
  const auto address = reinterpret_cast<std::uintptr_t>(b.data());
  EXPECT_EQ(address % (bytes >= (2U << 20) ? 2U << 20 : 64U), 0U);
  auto* data = static_cast<unsigned char*>(b.data());
  EXPECT_TRUE(std::all_of(data, data + bytes, [](unsigned char c) { return c == 0; }));
  std::fill(data, data + bytes, static_cast<unsigned char>(1));
  EXPECT_EQ(b.workspace().size, bytes);
  EXPECT_EQ(b.workspace().data, b.data());
}
INSTANTIATE_TEST_SUITE_P(Sizes, BufferTest,
                         ::testing::Values(1, 63, 64, 4097, (2U << 20) - 1, 2U << 20,
                                           (2U << 20) + 1, 7U << 20));

TEST(BufferTest, EmptyHasNoMemory) {
  EXPECT_EQ(Buffer().data(), nullptr);
  EXPECT_EQ(Buffer(0).data(), nullptr);
}

TEST(BufferTest, MoveTakesTheMemory) {
  Buffer a(100);
  void* data = a.data();
  Buffer b(std::move(a));
  EXPECT_EQ(b.data(), data);
  Buffer c(3U << 20);
  c = std::move(b);
  EXPECT_EQ(c.data(), data);
  EXPECT_EQ(c.size(), 100U);
}

TEST(BufferTest, ReserveOnlyGrows) {
  Buffer b(100);
  void* data = b.data();
  b.reserve(50);
  EXPECT_EQ(b.data(), data);
  b.reserve(5U << 20);
  EXPECT_EQ(b.size(), 5U << 20);
}

TEST(BufferTest, TooLargeIsADeviceError) {
  EXPECT_THROW(Buffer(SIZE_MAX), DeviceError);
  EXPECT_THROW(Buffer(SIZE_MAX / 4), DeviceError);
}

}  // namespace
}  // namespace attend
