// SPDX-License-Identifier: Apache-2.0
#include "attend/core/cpu.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attend/core/error.h"
#include "core/cpu_detect.h"
#include "core/x86_features.h"

namespace attend {
namespace {

using enum IsaLevel;

constexpr std::uint32_t bits(std::initializer_list<int> positions) {
  std::uint32_t word = 0;
  for (const int p : positions) word |= 1U << p;
  return word;
}

// A machine that has everything; tests take one thing away.
X86Features full() {
  return {.leaf1_ecx = bits({12, 28, 29}),
          .leaf7_ebx = bits({5, 16, 17, 30, 31}),
          .leaf7_ecx = bits({1, 11}),
          .leaf7_edx = bits({22, 23, 24, 25}),
          .leaf7_1_eax = bits({5}),
          .xcr0 = 0x600E7,
          .tiles_permitted = true};
}

TEST(X86FeaturesTest, EachMissingPieceLowersTheLevel) {
  EXPECT_EQ(best_isa(full()), amx);
  EXPECT_EQ(best_isa({}), scalar);
  const auto without = [](auto change) {
    X86Features f = full();
    change(f);
    return best_isa(f);
  };
  for (const int bit : {12, 28, 29}) {
    EXPECT_EQ(without([&](X86Features& f) { f.leaf1_ecx &= ~bits({bit}); }), scalar) << bit;
  }
  EXPECT_EQ(without([](X86Features& f) { f.leaf7_ebx &= ~bits({5}); }), scalar);
  for (const int bit : {16, 17, 30, 31}) {
    EXPECT_EQ(without([&](X86Features& f) { f.leaf7_ebx &= ~bits({bit}); }), avx2) << bit;
  }
  EXPECT_EQ(without([](X86Features& f) { f.leaf7_ecx = 0; }), avx512);
  EXPECT_EQ(without([](X86Features& f) { f.leaf7_ecx = bits({11}); }), avx512_vnni);
  EXPECT_EQ(without([](X86Features& f) { f.leaf7_edx &= ~bits({23}); }), avx512_vnni);
  EXPECT_EQ(without([](X86Features& f) { f.leaf7_1_eax = 0; }), avx512_vnni);
  for (const int bit : {22, 24, 25}) {
    EXPECT_EQ(without([&](X86Features& f) { f.leaf7_edx &= ~bits({bit}); }), avx512_spr) << bit;
  }
  EXPECT_EQ(without([](X86Features& f) { f.tiles_permitted = false; }), avx512_spr);
}

TEST(X86FeaturesTest, TheOperatingSystemMustSaveTheRegisters) {
  X86Features f = full();
  f.xcr0 = 0x200E7;  // tile configuration saved, tile data not
  EXPECT_EQ(best_isa(f), avx512_spr);
  f.xcr0 = 0x400E7;
  EXPECT_EQ(best_isa(f), avx512_spr);
  f.xcr0 = 0x60007;  // tiles are of no use to us without AVX-512
  EXPECT_EQ(best_isa(f), avx2);
  f.xcr0 = 0x07;
  EXPECT_EQ(best_isa(f), avx2);
  f.xcr0 = 0x67;  // upper zmm halves saved, zmm 16-31 not
  EXPECT_EQ(best_isa(f), avx2);
  f.xcr0 = 0x03;
  EXPECT_EQ(best_isa(f), scalar);
  f.xcr0 = 0;
  EXPECT_EQ(best_isa(f), scalar);
}

TEST(X86FeaturesTest, PermissionIsAskedForOnlyWhereItDecides) {
  X86Features f = full();
  EXPECT_TRUE(tiles_need_permission(f));
  f.tiles_permitted = false;
  EXPECT_TRUE(tiles_need_permission(f));
  f.xcr0 = 0xE7;
  EXPECT_FALSE(tiles_need_permission(f));
  f = full();
  f.leaf7_edx &= ~bits({24});
  EXPECT_FALSE(tiles_need_permission(f));
  f = full();
  f.leaf7_1_eax = 0;
  EXPECT_FALSE(tiles_need_permission(f));
  EXPECT_FALSE(tiles_need_permission({}));
}

TEST(CpuTest, NamesRoundTrip) {
  for (const IsaLevel level : {scalar, avx2, avx512, avx512_vnni, avx512_spr, amx}) {
    EXPECT_EQ(parse_isa(to_string(level)), level);
  }
  EXPECT_EQ(parse_isa("AVX2"), std::nullopt);
  EXPECT_EQ(parse_isa(""), std::nullopt);
}

TEST(CpuTest, LevelsAscendFromScalarToTheBest) {
  const auto levels = available_isa_levels();
  ASSERT_FALSE(levels.empty());
  EXPECT_EQ(levels.front(), scalar);
  EXPECT_EQ(levels.back(), cpu_info().best);
  EXPECT_TRUE(std::is_sorted(levels.begin(), levels.end()));
}

#if defined(__x86_64__) && defined(__linux__)
TEST(CpuTest, TheBestLevelIsAmxIfLinuxPermitsTiles) {
  if (highest_built_isa() < amx) GTEST_SKIP() << "built without the kernels of amx";
  constexpr long kGetStatePermission = 0x1022;  // ARCH_GET_XCOMP_PERM
  const IsaLevel best = cpu_info().best;
  std::uint64_t permitted = 0;  // stays so where the kernel knows no such question
  syscall(SYS_arch_prctl, kGetStatePermission, &permitted);
  EXPECT_EQ(best == amx, (permitted >> 18 & 1U) != 0) << permitted;
}
#endif

#if defined(__x86_64__)
// A second opinion on cpuid and xgetbv.
TEST(CpuTest, AgreesWithTheCompilersDetection) {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const auto expect_level = [](IsaLevel level, bool machine_has_it) {
    EXPECT_EQ(cpu_info().best >= level, machine_has_it && level <= highest_built_isa());
  };
  expect_level(avx2, has_avx2);
  expect_level(avx512, has_avx512);
  expect_level(avx512_vnni, has_avx512 && __builtin_cpu_supports("avx512vnni"));
}
#endif

TEST(CpuTest, ResolvesAForcedLevel) {
  const std::vector levels = {scalar, avx2};
  EXPECT_EQ(resolve_isa(std::nullopt, levels), avx2);
  EXPECT_EQ(resolve_isa("scalar", levels), scalar);
  EXPECT_EQ(resolve_isa("avx2", levels), avx2);
}

TEST(CpuTest, AForcedLevelThatIsMissingIsAnErrorNotAFallback) {
  const std::vector levels = {scalar, avx2};
  try {
    resolve_isa("avx512", levels);
    FAIL() << "nothing thrown";
  } catch (const Unsupported& e) {
    EXPECT_STREQ(e.what(), "ATTEND_ISA=avx512: this machine lacks it; available are scalar, avx2");
  }
  EXPECT_THROW(resolve_isa("sse2", levels), Unsupported);
  EXPECT_THROW(resolve_isa("", levels), Unsupported);
}

}  // namespace
}  // namespace attend
