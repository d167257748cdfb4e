// SPDX-License-Identifier: Apache-2.0
#include "attend/core/huge_pages.h"

#include <gtest/gtest.h>

#include "support/temp_folder.h"

namespace attend {
namespace {

TEST(HugePageMode, IsTheWordInBrackets) {
  const testing::TempFolder folder;
  const auto mode = [&](const std::string& text) {
    folder.write("enabled", text);
    return read_huge_page_mode(folder.path());
  };
  EXPECT_EQ(mode("[always] madvise never\n"), HugePageMode::always);
  EXPECT_EQ(mode("always [madvise] never\n"), HugePageMode::madvise);
  EXPECT_EQ(mode("always madvise [never]\n"), HugePageMode::never);
  for (const std::string garbage : {"", "always madvise never", "[sometimes]", "[[madvise"})
    EXPECT_EQ(mode(garbage), HugePageMode::unknown) << garbage;
  EXPECT_EQ(mode("[always]" + std::string(300, ' ')), HugePageMode::unknown);
}

TEST(HugePageMode, IsUnknownWithoutTheFile) {
  EXPECT_EQ(read_huge_page_mode("/nonexistent"), HugePageMode::unknown);
}

TEST(HugePageMode, HasNames) {
  EXPECT_EQ(to_string(HugePageMode::madvise), "madvise");
  EXPECT_EQ(to_string(HugePageMode::unknown), "unknown");
}

}  // namespace
}  // namespace attend
