// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/kernel_choice.h"

#include <gmock/gmock.h>
#include <sys/stat.h>
#include <unistd.h>

#include <iterator>
#include <nlohmann/json.hpp>
#include <set>

#include "attend/core/error.h"
#include "core/cpu_detect.h"
#include "plan/kernel_choice_file.h"
#include "support/temp_folder.h"

namespace attend::plan {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;
using testing::TempFolder;
using ::testing::ThrowsMessage;

const ChoiceMachine kMachine = {
    "1.2.3", "some CPU", {IsaLevel::scalar, IsaLevel::avx2, IsaLevel::avx512}};

KernelLevels some_levels() {
  KernelLevels levels;
  levels.fill(IsaLevel::avx512);
  levels[static_cast<std::size_t>(KernelKind::bf16)] = IsaLevel::avx2;
  levels[static_cast<std::size_t>(KernelKind::int8_level2_bf16)] = IsaLevel::scalar;
  return levels;
}

// A cache folder with a choice in it.
struct Stored {
  TempFolder folder;
  std::filesystem::path path = choice_path(folder.path().c_str(), nullptr);
  Stored() { write_choice(path, kMachine, some_levels()); }
  nlohmann::json json() const { return nlohmann::json::parse(std::ifstream(path)); }
  void write(const std::string& text) const { std::ofstream(path, std::ios::trunc) << text; }
  std::string problem() const {
    const StoredChoice stored = read_choice(path, kMachine);
    EXPECT_EQ(stored.levels.has_value(), stored.problem.empty());
    // What is not understood is as good as not there.
    const KernelChoice choice = choose(nullptr, path, kMachine);
    EXPECT_EQ(choice.problem, stored.problem);
    if (!stored.levels) {
      EXPECT_EQ(choice.source, ChoiceSource::highest);
      EXPECT_THAT(choice.levels, Each(IsaLevel::avx512));
    }
    return stored.problem;
  }
};

TEST(KernelKinds, HaveNamesOfTheirOwnAndTheirTypes) {
  std::set<std::string_view> names;
  for (const KernelKind kind : kKernelKinds) names.insert(to_string(kind));
  EXPECT_EQ(names.size(), kNumKernelKinds);
  for (std::size_t i = 0; i < kNumKernelKinds; ++i)
    EXPECT_EQ(static_cast<std::size_t>(kKernelKinds[i]), i);
  EXPECT_EQ(kernel_kind(DType::f16, DType::f16, DType::f16), KernelKind::f16);
  EXPECT_EQ(kernel_kind(DType::f32, DType::fp8_e4m3, DType::fp8_e4m3), KernelKind::fp8_e4m3);
  EXPECT_EQ(kernel_kind(DType::bf16, DType::i8, DType::i8), KernelKind::int8_per_token_head);
  EXPECT_EQ(kernel_kind(DType::i8, DType::i8, DType::i8), KernelKind::int8_level1);
  EXPECT_EQ(kernel_kind(DType::i8, DType::i8, DType::f16), KernelKind::int8_level2_f16);
  EXPECT_EQ(kernel_kind(DType::i8, DType::i8, DType::bf16), KernelKind::int8_level2_bf16);
}

TEST(ChoicePath, IsInTheCacheFolderOfTheUser) {
  EXPECT_EQ(choice_path("/x/cache", "/home/u"), "/x/cache/attend/kernels.json");
  EXPECT_EQ(choice_path(nullptr, "/home/u"), "/home/u/.cache/attend/kernels.json");
  for (const char* unset : {"", "relative"}) {
    EXPECT_EQ(choice_path(unset, "/home/u"), "/home/u/.cache/attend/kernels.json");
    EXPECT_EQ(choice_path(unset, unset), "");
  }
  EXPECT_EQ(choice_path(nullptr, nullptr), "");
}

TEST(ChoiceFile, GivesBackWhatWasWritten) {
  const Stored stored;
  const StoredChoice read = read_choice(stored.path, kMachine);
  ASSERT_TRUE(read.levels) << read.problem;
  EXPECT_EQ(*read.levels, some_levels());
  const KernelChoice choice = choose(nullptr, stored.path, kMachine);
  EXPECT_EQ(choice.source, ChoiceSource::file);
  EXPECT_EQ(choice.file, stored.path.string());
  EXPECT_EQ(choice.level(KernelKind::bf16), IsaLevel::avx2);
  EXPECT_EQ(choice.level(KernelKind::f32), IsaLevel::avx512);
  // Nothing is left beside it.
  const std::filesystem::directory_iterator files(stored.path.parent_path());
  EXPECT_EQ(std::distance(begin(files), end(files)), 1);
}

TEST(ChoiceFile, WritingReplacesWhatWasThere) {
  const Stored stored;
  stored.write(std::string(100000, 'x'));
  write_choice(stored.path, kMachine, some_levels());
  EXPECT_EQ(stored.problem(), "");
}

TEST(ChoiceFile, NoFileIsNoProblem) {
  const TempFolder folder;
  const KernelChoice choice = choose(nullptr, folder.path() / "attend/kernels.json", kMachine);
  EXPECT_EQ(choice.source, ChoiceSource::highest);
  EXPECT_EQ(choice.problem, "");
  EXPECT_THAT(choice.levels, Each(IsaLevel::avx512));
  EXPECT_EQ(choose(nullptr, "", kMachine).file, "");
}

TEST(ChoiceFile, OfAnotherVersionOrCpuIsNotUsed) {
  const Stored stored;
  ChoiceMachine other = kMachine;
  other.version = "1.2.4";
  EXPECT_THAT(read_choice(stored.path, other).problem, HasSubstr("version"));
  other = kMachine;
  other.cpu = "some CPU, faster";
  EXPECT_THAT(read_choice(stored.path, other).problem, HasSubstr("CPU"));
  other = kMachine;
  other.levels.pop_back();  // the same CPU, with a level forbidden
  EXPECT_THAT(read_choice(stored.path, other).problem, HasSubstr("no level"));
}

TEST(ChoiceFile, ThatCannotBeUnderstoodIsNotUsed) {
  const Stored stored;
  const std::string good = stored.json().dump();
  for (const std::string& text : std::vector<std::string>{
           "", "{", "null", "[]", "7", "\"x\"", "{}", good.substr(0, good.size() - 1), good + "x",
           std::string(50000, '['), std::string(9, '\0'), "{\"format\":{\"a\":[[[[]]]]}}"}) {
    stored.write(text);
    EXPECT_EQ(stored.problem(), "not a choice of kernels") << text.substr(0, 60);
  }
}

TEST(ChoiceFile, EveryPartMustBeRight) {
  const Stored stored;
  const nlohmann::json good = stored.json();
  const auto refused = [&](const char* pointer, const nlohmann::json& value) {
    SCOPED_TRACE(pointer + value.dump());
    nlohmann::json bad = good;
    bad[nlohmann::json::json_pointer(pointer)] = value;
    stored.write(bad.dump());
    EXPECT_NE(stored.problem(), "");
  };
  for (const nlohmann::json& wrong :
       {nlohmann::json(), nlohmann::json(0), nlohmann::json("1"), nlohmann::json::array({1})})
    for (const char* part : {"/format", "/version", "/cpu", "/levels"}) refused(part, wrong);
  for (const KernelKind kind : kKernelKinds) {
    const std::string pointer = "/levels/" + std::string(to_string(kind));
    for (const nlohmann::json& wrong :
         {nlohmann::json(), nlohmann::json(1), nlohmann::json("quantum"), nlohmann::json("amx"),
          nlohmann::json("avx2 "), nlohmann::json::array({"avx2"})})
      refused(pointer.c_str(), wrong);
    nlohmann::json missing = good;
    missing["levels"].erase(std::string(to_string(kind)));
    stored.write(missing.dump());
    EXPECT_THAT(stored.problem(), HasSubstr(std::string(to_string(kind))));
  }
  stored.write(good.dump());
  EXPECT_EQ(stored.problem(), "");
}

TEST(ChoiceFile, TooLargeOrNoFileAtAllIsNotUsed) {
  const Stored stored;
  stored.write(stored.json().dump() + std::string(1 << 16, ' '));
  EXPECT_THAT(stored.problem(), HasSubstr("more than"));
  std::filesystem::remove(stored.path);
  ASSERT_EQ(mkfifo(stored.path.c_str(), 0600), 0);
  EXPECT_EQ(stored.problem(), "not a regular file");
  std::filesystem::remove(stored.path);
  std::filesystem::create_directory(stored.path);
  EXPECT_EQ(stored.problem(), "not a regular file");
}

TEST(ChoiceFile, EnvironmentGoesBeforeIt) {
  const Stored stored;
  const KernelChoice choice = choose("avx2", stored.path, kMachine);
  EXPECT_EQ(choice.source, ChoiceSource::environment);
  EXPECT_THAT(choice.levels, Each(IsaLevel::avx2));
  EXPECT_EQ(choice.file, "");
  EXPECT_THROW(choose("amx", stored.path, kMachine), Unsupported);
  EXPECT_THROW(choose("quantum", stored.path, kMachine), Unsupported);
}

TEST(ChoiceFile, ThatCannotBeWrittenIsOneClearError) {
  const TempFolder folder;
  const auto file = folder.write("file", "");
  EXPECT_THAT([&] { write_choice(file / "attend/kernels.json", kMachine, some_levels()); },
              ThrowsMessage<Error>(HasSubstr("cannot write the choice of kernels to '" +
                                             (file / "attend").string())));
  if (geteuid() != 0) {  // nothing is forbidden to root
    const auto closed = folder.path() / "closed";
    std::filesystem::create_directory(closed);
    ASSERT_EQ(chmod(closed.c_str(), 0500), 0);
    EXPECT_THAT([&] { write_choice(closed / "kernels.json", kMachine, some_levels()); },
                ThrowsMessage<Error>(HasSubstr("Permission denied")));
  }
  // The place of the file is taken by a folder: what was written beside it goes.
  const auto taken = folder.path() / "attend/kernels.json";
  std::filesystem::create_directories(taken / "x");
  EXPECT_THROW(write_choice(taken, kMachine, some_levels()), Error);
  EXPECT_NO_THROW(require_writable(taken));  // which leaves nothing either
  const std::filesystem::directory_iterator files(taken.parent_path());
  EXPECT_EQ(std::distance(begin(files), end(files)), 1);
}

TEST(CpuIdentity, IsTheSameTwiceAndHasNoModelName) {
  EXPECT_EQ(cpu_identity(), cpu_identity());
  EXPECT_THAT(cpu_identity(), HasSubstr(" CPUs"));
  if (!cpu_info().model.empty()) {
    EXPECT_THAT(cpu_identity(), ::testing::Not(HasSubstr(cpu_info().model)));
  }
  EXPECT_EQ(this_machine().levels, available_isa_levels());
}

TEST(KernelLevel, IsThePlansWhereItsMakerNamedOne) {
  const std::vector<std::int32_t> starts = {0, 1}, lens = {5};
  AttentionPlanInput in;
  in.query_start_loc = starts;
  in.seq_lens = lens;
  in.num_q_heads = in.num_kv_heads = 1;
  in.head_dim_qk = in.head_dim_v = 8;
  for (const KernelKind kind : kKernelKinds)
    EXPECT_EQ(kernel_level(plan_attention(in), kind), kernel_choice().level(kind));
  in.isa = IsaLevel::scalar;
  EXPECT_EQ(kernel_level(plan_attention(in), KernelKind::f32), IsaLevel::scalar);
}

}  // namespace
}  // namespace attend::plan
