// SPDX-License-Identifier: Apache-2.0
// The rules of the selector, on back ends made for the purpose.
#include <gmock/gmock.h>

#include <array>

#include "backend/fake_backend.h"
#include "registry/priority.h"
#include "registry/select.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using testing::FakeBackend;
using ::testing::IsEmpty;
using ::testing::Pair;
using testing::plain_config;

Capability on(std::vector<DeviceType> devices) {
  Capability can;
  can.devices = std::move(devices);
  return can;
}

TEST(Select, TakesTheFirstThatFitsAndTellsAboutAllOthers) {
  Capability mla;
  mla.is_mla = true;
  const FakeBackend a("A", mla), b("B"), c("C", {}, "not together"), d("D");
  const std::array<const Backend*, 4> candidates = {&a, &b, &c, &d};
  const Selection s = select_first(candidates, plain_config());
  EXPECT_EQ(s.backend, &b);
  EXPECT_THAT(s.also_valid, ElementsAre("D"));
  EXPECT_THAT(s.rejected, ElementsAre(Pair("A", ElementsAre("non-MLA not supported")),
                                      Pair("C", ElementsAre("not together"))));
}

TEST(Select, NothingFits) {
  const FakeBackend a("A", {}, "no");
  const std::array<const Backend*, 1> candidates = {&a};
  const Selection s = select_first(candidates, plain_config());
  EXPECT_EQ(s.backend, nullptr);
  EXPECT_THAT(s.rejected, ElementsAre(Pair("A", ElementsAre("no"))));
}

TEST(Select, PlatformIsTheLastReasonAndOnlyOfTheAutomaticChoice) {
  const FakeBackend a("A", on({DeviceType::cpu, DeviceType::cuda}), "no");
  const FakeBackend b("B", on({DeviceType::rocm}));
  const std::array<const Backend*, 2> candidates = {&a, &b};
  const AttentionConfig config = plain_config("rocm:gfx942");
  const Selection s = select_first(candidates, config);
  EXPECT_EQ(s.backend, &b);
  EXPECT_THAT(s.rejected,
              ElementsAre(Pair("A", ElementsAre("no",
                                                "platform not supported: rocm:gfx942 (chosen "
                                                "automatically on cpu, cuda only; elsewhere ask "
                                                "for it by name)"))));
  EXPECT_THAT(select_only(a, config).rejected, ElementsAre(Pair("A", ElementsAre("no"))));
  EXPECT_EQ(select_only(b, plain_config("cpu")).backend, &b);
  EXPECT_THAT(select_only(b, plain_config("cpu")).rejected, IsEmpty());
}

TEST(Priority, TableFirstThenTheRestAsTheyCome) {
  const FakeBackend a("A_NEW_ONE"), diff("DIFFERENTIAL_FLASH_ATTN"), sparse("FLASHMLA_SPARSE"),
      flash("FLASH_ATTN"), mla("FLASH_ATTN_MLA");
  const std::array<const Backend*, 5> all = {&a, &diff, &sparse, &flash, &mla};
  AttentionConfig config = plain_config("cuda:9.0");
  EXPECT_THAT(order_by_priority(all, config), ElementsAre(&flash, &diff, &a, &sparse, &mla));
  config.use_mla = true;
  EXPECT_THAT(order_by_priority(all, config), ElementsAre(&mla, &sparse, &a, &diff, &flash));
}

TEST(Priority, SkipsNamesThatThisBuildDoesNotHave) {
  const FakeBackend flash("FLASH_ATTN");
  const std::array<const Backend*, 1> all = {&flash};
  for (const char* platform : {"cpu", "cuda:8.0", "rocm:gfx942"}) {
    EXPECT_THAT(order_by_priority(all, plain_config(platform)), ElementsAre(&flash)) << platform;
  }
}

}  // namespace
}  // namespace attend
