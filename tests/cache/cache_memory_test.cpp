// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/cache_memory.h"

#include <gmock/gmock.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attend/core/error.h"
#include "attend/core/huge_pages.h"
#include "core/affinity.h"

namespace attend {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

bool all_bytes_are(const CacheMemory& m, unsigned char value) {
  const auto* data = static_cast<const unsigned char*>(m.data());
  return std::all_of(data, data + m.size(), [&](unsigned char c) { return c == value; });
}

TEST(CacheMemory, IsAlignedFilledAndWritableToTheEnd) {
  for (const std::size_t bytes : {std::size_t{1}, kHugePageBytes, 3 * kHugePageBytes + 5}) {
    for (const int workers : {1, 3}) {
      const auto pool = make_thread_pool(workers);
      const CacheMemory m(bytes, {.executor = pool.get(), .fill = 0xff});
      EXPECT_EQ(m.size(), bytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(m.data()) % kHugePageBytes, 0U);
      EXPECT_TRUE(all_bytes_are(m, 0xff));
      std::fill_n(static_cast<unsigned char*>(m.data()), bytes, static_cast<unsigned char>(1));
    }
  }
  EXPECT_TRUE(all_bytes_are(CacheMemory(kHugePageBytes + 1), 0));
}

TEST(CacheMemory, SaysWhetherItMayHaveHugePages) {
  const CacheMemory large(8 * kHugePageBytes), small(100),
      plain(8 * kHugePageBytes, {.huge_pages = false});
  EXPECT_EQ(large.report().huge_pages_advised, large.report().huge_pages_problem.empty());
  const HugePageMode mode = huge_page_mode();
  EXPECT_EQ(large.report().huge_pages_advised,
            mode == HugePageMode::always || mode == HugePageMode::madvise);
  EXPECT_FALSE(small.report().huge_pages_advised);
  EXPECT_THAT(small.report().huge_pages_problem, HasSubstr("smaller"));
  EXPECT_EQ(small.huge_page_bytes(), 0U);
  EXPECT_FALSE(plain.report().huge_pages_advised);
  EXPECT_EQ(plain.report().huge_pages_problem, "");
  EXPECT_LE(large.huge_page_bytes(), large.size());
  if (mode == HugePageMode::madvise) {
    EXPECT_EQ(plain.huge_page_bytes(), 0U);
  }
}

// Huge pages that a mapping of so many bytes gets from the kernel without this library.
std::size_t huge_page_bytes_of_a_mapping(std::size_t bytes) {
  void* const data =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return 0;
  madvise(data, bytes, MADV_HUGEPAGE);
  std::memset(data, 1, bytes);
  const std::size_t huge = count_huge_page_bytes(data, bytes);
  munmap(data, bytes);
  return huge;
}

TEST(CacheMemory, GetsHugePagesWhereTheKernelGivesThem) {
  if (huge_page_bytes_of_a_mapping(17 * kHugePageBytes) < 16 * kHugePageBytes)
    GTEST_SKIP() << "the kernel gives none, or has too few left";
  const CacheMemory m(16 * kHugePageBytes);
  EXPECT_TRUE(m.report().huge_pages_advised) << m.report().huge_pages_problem;
  EXPECT_GT(m.huge_page_bytes(), 0U);
  EXPECT_EQ(m.huge_page_bytes() % kHugePageBytes, 0U);
}

TEST(CacheMemory, SharesItselfOutToTheNodes) {
  const std::vector<int> own = thread_cpus();
  if (own.size() < 2) GTEST_SKIP() << "needs two CPUs";
  const NumaTopology two = {{{0, {own[0]}, 1 << 30}, {5, {own[1]}, 1 << 30}}, ""};
  const auto pool = make_thread_pool(2);
  const CacheMemory m(5 * kHugePageBytes - 7,
                      {.executor = pool.get(), .fill = 3, .topology = &two});
  EXPECT_TRUE(all_bytes_are(m, 3));
  ASSERT_EQ(m.report().nodes.size(), 2U);
  EXPECT_EQ(m.report().nodes[0].node, 0);
  EXPECT_EQ(m.report().nodes[0].bytes, 3 * kHugePageBytes - 7);
  EXPECT_EQ(m.report().nodes[1].node, 5);
  EXPECT_EQ(m.report().nodes[1].bytes, 2 * kHugePageBytes);
  EXPECT_EQ(m.report().nodes_problem, "");
}

TEST(CacheMemory, NothingIsSharedOutOnOneNodeOrAnUnknownMachine) {
  const NumaTopology one = {{{0, thread_cpus(), 1 << 30}}, ""}, unknown = {{}, "no nodes"};
  for (const NumaTopology* topology : {&one, &unknown}) {
    const CacheMemory m(3 * kHugePageBytes, {.topology = topology});
    EXPECT_THAT(m.report().nodes, IsEmpty());
    EXPECT_EQ(m.report().nodes_problem, "");
  }
}

TEST(CacheMemory, MoveTakesTheMemoryAndItsReport) {
  CacheMemory a(100, {.fill = 9});
  void* data = a.data();
  CacheMemory b(std::move(a));
  EXPECT_EQ(b.data(), data);
  CacheMemory c(kHugePageBytes);
  c = std::move(b);
  EXPECT_EQ(c.data(), data);
  EXPECT_EQ(c.size(), 100U);
  EXPECT_THAT(c.report().huge_pages_problem, HasSubstr("smaller"));
  EXPECT_TRUE(all_bytes_are(c, 9));
}

TEST(CacheMemory, EmptyHasNoMemory) {
  EXPECT_EQ(CacheMemory().data(), nullptr);
  EXPECT_EQ(CacheMemory(0).data(), nullptr);
  EXPECT_EQ(CacheMemory(0).huge_page_bytes(), 0U);
}

TEST(CacheMemory, TooLargeIsADeviceError) {
  EXPECT_THROW(CacheMemory{SIZE_MAX}, DeviceError);
  EXPECT_THROW(CacheMemory{SIZE_MAX / 8}, DeviceError);
}

}  // namespace
}  // namespace attend
