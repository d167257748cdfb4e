// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>

#include "attend/core/cpu.h"
#include "cli/run_cli.h"
#include "plan/kernel_choice_file.h"
#include "support/scale.h"
#include "support/temp_folder.h"

namespace attend::testing {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

// A user without a stored choice, in an environment that asks for no level.
class TuneCommand : public ::testing::Test {
 protected:
  TuneCommand() {
    setenv("XDG_CACHE_HOME", folder_.path().c_str(), 1);
    if (const char* isa = getenv("ATTEND_ISA")) isa_ = isa;
    unsetenv("ATTEND_ISA");
  }
  ~TuneCommand() override {
    unsetenv("XDG_CACHE_HOME");
    if (isa_) setenv("ATTEND_ISA", isa_->c_str(), 1);
  }
  static nlohmann::json kernels() {
    return nlohmann::json::parse(run_cli("info --json -").out).at("kernels");
  }

  const TempFolder folder_;
  const std::string file_ = folder_.path() / "attend/kernels.json";
  std::optional<std::string> isa_;
};

TEST_F(TuneCommand, StoresAChoiceThatInfoShows) {
  if (scaled(0, 1) == 1) GTEST_SKIP() << "emulated kernels take minutes";
  EXPECT_EQ(kernels().at("source"), "highest");
  EXPECT_EQ(kernels().at("file"), file_);
  const CliResult r = run_cli("tune --force --json -");
  ASSERT_EQ(r.exit_code, 0) << r.err;
  const auto tuned = nlohmann::json::parse(r.out);
  EXPECT_EQ(tuned.at("file"), file_);
  EXPECT_TRUE(tuned.at("noisy").is_boolean());
  const auto used = kernels();
  EXPECT_EQ(used.at("source"), "file");
  EXPECT_EQ(used.at("problem"), "");
  ASSERT_EQ(tuned.at("kinds").size(), kNumKernelKinds);
  for (const auto& [kind, times] : tuned.at("kinds").items()) {
    EXPECT_EQ(used.at("levels").at(kind), times.at("chosen")) << kind;
    EXPECT_TRUE(times.at("levels").contains(times.at("chosen").get<std::string>()));
  }
  EXPECT_THAT(run_cli("info").out, HasSubstr("as measured, " + file_));

  EXPECT_EQ(run_cli("tune --remove").exit_code, 0);
  EXPECT_EQ(kernels().at("source"), "highest");
  EXPECT_THAT(run_cli("tune --remove").out, HasSubstr("there is no"));
}

TEST_F(TuneCommand, DryRunWritesNothing) {
  if (scaled(0, 1) == 1) GTEST_SKIP() << "emulated kernels take minutes";
  const CliResult r = run_cli("tune --dry-run");
  EXPECT_EQ(r.exit_code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("int8_level1"));
  EXPECT_FALSE(std::filesystem::exists(file_));
}

TEST_F(TuneCommand, InfoSaysWhyAFileIsNotUsed) {
  folder_.write("attend/kernels.json", "{}");
  EXPECT_EQ(kernels().at("source"), "highest");
  EXPECT_EQ(kernels().at("problem"), "not a choice of kernels");
  EXPECT_THAT(run_cli("info").out, HasSubstr(file_ + " was not used: not a choice of kernels"));
}

TEST_F(TuneCommand, EnvironmentGoesBeforeTheFile) {
  KernelLevels levels;
  levels.fill(available_isa_levels().back());
  plan::write_choice(file_, plan::this_machine(), levels);
  ASSERT_EQ(setenv("ATTEND_ISA", "scalar", 1), 0);
  const auto used = kernels();
  const std::string text = run_cli("info").out;
  unsetenv("ATTEND_ISA");
  EXPECT_EQ(used.at("source"), "environment");
  EXPECT_THAT(used.at("levels"), Each("scalar"));
  EXPECT_THAT(text, HasSubstr("as ATTEND_ISA says"));
}

TEST_F(TuneCommand, AFolderThatCannotBeWrittenIsOneLine) {
  const auto file = folder_.write("file", "");
  ASSERT_EQ(setenv("XDG_CACHE_HOME", file.c_str(), 1), 0);
  const CliResult r = run_cli("tune");
  EXPECT_EQ(r.exit_code, 2);
  EXPECT_THAT(r.err, HasSubstr("cannot write the choice of kernels to '" + file.string()));
  EXPECT_EQ(std::ranges::count(r.err, '\n'), 1);
}

TEST_F(TuneCommand, WithoutACacheFolderNothingIsMeasured) {
  const std::string home = getenv("HOME") != nullptr ? getenv("HOME") : "/";
  setenv("XDG_CACHE_HOME", "relative", 1);
  setenv("HOME", "", 1);
  const CliResult r = run_cli("tune");
  setenv("HOME", home.c_str(), 1);
  EXPECT_EQ(r.exit_code, 2);
  EXPECT_THAT(r.err, HasSubstr("set XDG_CACHE_HOME or HOME"));
  EXPECT_EQ(r.out, "");
}

}  // namespace
}  // namespace attend::testing
