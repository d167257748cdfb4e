// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "attend/core/float_types.h"
#include "attend/ops/attention.h"
#include "attend/plan/kernel_choice.h"
#include "plan/kernel_choice_file.h"
#include "support/temp_folder.h"

namespace attend {
namespace {

// Before anything is chosen: a stored choice of scalar kernels for f32.
class StoredChoice : public ::testing::Environment {
 public:
  void SetUp() override {
    unsetenv("ATTEND_ISA");
    setenv("XDG_CACHE_HOME", folder_.path().c_str(), 1);
    KernelLevels levels;
    levels.fill(available_isa_levels().back());
    levels[static_cast<std::size_t>(KernelKind::f32)] = IsaLevel::scalar;
    plan::write_choice(plan::choice_path(), plan::this_machine(), levels);
  }

 private:
  testing::TempFolder folder_;
};
const ::testing::Environment* const kStored = ::testing::AddGlobalTestEnvironment(new StoredChoice);

// Outputs for one request of 700 keys, on a level or the chosen one.
template <typename T>
std::vector<T> attend_with(DType dtype, std::optional<IsaLevel> isa) {
  constexpr int kKeys = 700, kQueries = 3, kHeads = 4, kDim = 64;
  std::vector<T> q(kQueries * kHeads * kDim), k(kKeys * kHeads * kDim), v(k.size()), out(q.size());
  const auto fill = [](std::vector<T>& to, unsigned seed) {
    for (T& x : to)
      x = from_f32<T>(static_cast<float>((seed = seed * 1664525U + 1013904223U) >> 8) / (1 << 24) -
                      0.5F);
  };
  fill(q, 1);
  fill(k, 2);
  fill(v, 3);
  const std::vector<std::int32_t> query_start = {0, kQueries}, key_start = {0, kKeys};
  FlashAttnVarlenArgs args;
  args.q = {q.data(), dtype, {kQueries, kHeads, kDim}};
  args.k = {k.data(), dtype, {kKeys, kHeads, kDim}};
  args.v = {v.data(), dtype, {kKeys, kHeads, kDim}};
  args.out = {out.data(), dtype, {kQueries, kHeads, kDim}};
  args.query_start_loc = {query_start.data(), DType::i32, {2}};
  args.cu_seqlens_kv = {key_start.data(), DType::i32, {2}};
  flash_attn_varlen(args, nullptr, isa);
  return out;
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

TEST(TunedLevels, AreUsedWhereTheCallerNamesNone) {
  ASSERT_EQ(kernel_choice().source, ChoiceSource::file) << kernel_choice().problem;
  const auto tuned = attend_with<float>(DType::f32, std::nullopt);
  EXPECT_TRUE(same(tuned, attend_with<float>(DType::f32, IsaLevel::scalar)));
  const IsaLevel highest = available_isa_levels().back();
  if (highest == IsaLevel::scalar) return;
  // A level that the caller names goes before the choice.
  EXPECT_FALSE(same(tuned, attend_with<float>(DType::f32, highest)));
}

TEST(TunedLevels, AreThoseOfTheTypes) {
  const IsaLevel highest = available_isa_levels().back();
  EXPECT_TRUE(
      same(attend_with<bf16>(DType::bf16, std::nullopt), attend_with<bf16>(DType::bf16, highest)));
}

}  // namespace
}  // namespace attend
