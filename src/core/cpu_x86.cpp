// SPDX-License-Identifier: Apache-2.0
#include <cpuid.h>
#include <fmt/format.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <cstring>

#include "core/cpu_detect.h"
#include "core/x86_features.h"

namespace attend {
namespace {

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero if the CPU lacks the leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) noexcept {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

std::uint64_t xgetbv() noexcept {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

// Asks Linux to let this process use the tile registers, which is forbidden until then: their 8 KiB
// are saved for every thread that has used them, and older programs have signal stacks that cannot
// hold so much. It is refused if the alternative signal stack of some thread is too small, and by
// kernels before 5.16. Granted, it holds for all threads of the process, earlier and later.
bool request_tiles() noexcept {
#if defined(__linux__)
  constexpr long kRequestStatePermission = 0x1023;  // ARCH_REQ_XCOMP_PERM; old headers lack it
  constexpr long kTileData = 18;                    // bit of xcr0
  return syscall(SYS_arch_prctl, kRequestStatePermission, kTileData) == 0;
#else
  return false;
#endif
}

X86Features read_registers() noexcept {
  constexpr std::uint32_t kOsXsave = 1U << 27;
  const Registers leaf1 = cpuid(1);
  const Registers leaf7 = cpuid(7);
  X86Features f;
  f.leaf1_ecx = leaf1.ecx;
  f.leaf7_ebx = leaf7.ebx;
  f.leaf7_ecx = leaf7.ecx;
  f.leaf7_edx = leaf7.edx;
  f.leaf7_1_eax = leaf7.eax >= 1 ? cpuid(7, 1).eax : 0;
  f.xcr0 = (leaf1.ecx & kOsXsave) != 0 ? xgetbv() : 0;
  return f;
}

X86Features read_features() noexcept {
  X86Features f = read_registers();
  f.tiles_permitted = tiles_need_permission(f) && request_tiles();
  return f;
}

std::string vendor() {
  const Registers r = cpuid(0);
  std::array<char, 12> text{};
  std::memcpy(text.data(), &r.ebx, 4);
  std::memcpy(text.data() + 4, &r.edx, 4);
  std::memcpy(text.data() + 8, &r.ecx, 4);
  return {text.data(), text.size()};
}

std::string brand_string() {
  constexpr std::uint32_t kFirst = 0x80000002U;
  std::array<char, 3 * sizeof(Registers) + 1> text{};
  if (cpuid(0x80000000U).eax < kFirst + 2) return {};
  for (std::uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(kFirst + i);
    std::memcpy(text.data() + i * sizeof(Registers), &r, sizeof(Registers));
  }
  std::string brand(text.data());
  const auto begin = brand.find_first_not_of(' ');
  const auto end = brand.find_last_not_of(' ');
  return begin == std::string::npos ? std::string{} : brand.substr(begin, end - begin + 1);
}

// Reads cache descriptions of leaf 4 (Intel) or its copy 0x8000001d (AMD).
void read_caches(std::uint32_t leaf, CpuInfo& info) noexcept {
  constexpr std::uint32_t kData = 1;
  constexpr std::uint32_t kUnified = 3;
  constexpr std::uint32_t kMaxCaches = 16;
  for (std::uint32_t i = 0; i < kMaxCaches; ++i) {
    const Registers r = cpuid(leaf, i);
    const std::uint32_t kind = r.eax & 0x1FU;
    if (kind == 0) return;
    if (kind != kData && kind != kUnified) continue;
    const std::int64_t line = (r.ebx & 0xFFFU) + 1;
    const std::int64_t partitions = ((r.ebx >> 12) & 0x3FFU) + 1;
    const std::int64_t ways = ((r.ebx >> 22) & 0x3FFU) + 1;
    const std::int64_t bytes = line * partitions * ways * (std::int64_t{r.ecx} + 1);
    const std::uint32_t level = (r.eax >> 5) & 0x7U;
    if (level == 1) info.l1d_bytes = bytes;
    if (level == 2) info.l2_bytes = bytes;
    if (level == 3) info.l3_bytes = bytes;
  }
}

}  // namespace

std::string detect_cpu_signature() {
  const std::uint32_t eax = cpuid(1).eax;
  const std::uint32_t base_family = eax >> 8 & 0xFU, base_model = eax >> 4 & 0xFU;
  const std::uint32_t family = base_family + (base_family == 0xFU ? eax >> 20 & 0xFFU : 0U);
  const bool extended = base_family == 0xFU || base_family == 6U;
  const std::uint32_t model = base_model + (extended ? (eax >> 16 & 0xFU) << 4 : 0U);
  const X86Features f = read_registers();
  return fmt::format("{} family {} model {} stepping {} features {:x}-{:x}-{:x}-{:x}-{:x}-{:x}",
                     vendor(), family, model, eax & 0xFU, f.leaf1_ecx, f.leaf7_ebx, f.leaf7_ecx,
                     f.leaf7_edx, f.leaf7_1_eax, f.xcr0);
}

CpuInfo detect_cpu() {
  constexpr std::uint32_t kAmdCaches = 0x8000001DU;
  constexpr std::uint32_t kTopologyExtensions = 1U << 22;
  CpuInfo info;
  info.model = brand_string();
  info.best = best_isa(read_features());
  read_caches(4, info);
  const bool has_amd_leaf =
      cpuid(0x80000000U).eax >= kAmdCaches && (cpuid(0x80000001U).ecx & kTopologyExtensions) != 0;
  if (info.l1d_bytes == 0 && has_amd_leaf) read_caches(kAmdCaches, info);
  add_os_cache_sizes(info);
  return info;
}

}  // namespace attend
