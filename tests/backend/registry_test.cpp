// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <algorithm>

#include "attend/backend/selector.h"
#include "attend/core/error.h"

namespace attend {
namespace {

using ::testing::HasSubstr;

TEST(Registry, ListsBackendsByNameWithoutDoubles) {
  const auto all = backends();
  ASSERT_FALSE(all.empty());
  EXPECT_TRUE(std::is_sorted(all.begin(), all.end(),
                             [](auto* a, auto* b) { return a->name() <= b->name(); }));
}

TEST(Registry, FindsEachByItsName) {
  for (const Backend* backend : backends()) EXPECT_EQ(&find_backend(backend->name()), backend);
  EXPECT_EQ(find_backend("FLASH_ATTN").name(), "FLASH_ATTN");
}

TEST(Registry, UnknownNameListsTheValidOnes) {
  try {
    find_backend("flash_attn");
    FAIL() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "name");
    EXPECT_THAT(e.what(), HasSubstr("'flash_attn'"));
    for (const Backend* backend : backends()) {
      EXPECT_THAT(e.what(), HasSubstr(std::string(backend->name())));
    }
  }
}

}  // namespace
}  // namespace attend
