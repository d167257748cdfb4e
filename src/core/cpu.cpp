// SPDX-License-Identifier: Apache-2.0
#include "attend/core/cpu.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "attend/core/error.h"
#include "core/cpu_detect.h"
#include "highest_isa.inc"

namespace attend {
namespace {

constexpr std::array kLevels = {IsaLevel::scalar,      IsaLevel::avx2,       IsaLevel::avx512,
                                IsaLevel::avx512_vnni, IsaLevel::avx512_spr, IsaLevel::amx};

std::string join_levels(std::span<const IsaLevel> levels) {
  std::string text;
  for (const IsaLevel level : levels) {
    if (!text.empty()) text += ", ";
    text += to_string(level);
  }
  return text;
}

}  // namespace

std::string_view to_string(IsaLevel level) noexcept {
  switch (level) {
    case IsaLevel::scalar:
      return "scalar";
    case IsaLevel::avx2:
      return "avx2";
    case IsaLevel::avx512:
      return "avx512";
    case IsaLevel::avx512_vnni:
      return "avx512_vnni";
    case IsaLevel::avx512_spr:
      return "avx512_spr";
    case IsaLevel::amx:
      return "amx";
  }
  return "invalid ISA level";
}

std::optional<IsaLevel> parse_isa(std::string_view name) noexcept {
  for (const IsaLevel level : kLevels) {
    if (to_string(level) == name) return level;
  }
  return std::nullopt;
}

void add_os_cache_sizes(CpuInfo& info) noexcept {
  const auto fill = [](std::int64_t& bytes, int name) {
    if (bytes == 0) bytes = std::max<std::int64_t>(0, sysconf(name));
  };
  fill(info.l1d_bytes, _SC_LEVEL1_DCACHE_SIZE);
  fill(info.l2_bytes, _SC_LEVEL2_CACHE_SIZE);
  fill(info.l3_bytes, _SC_LEVEL3_CACHE_SIZE);
}

std::string cpu_identity() {
  return fmt::format("{}, {} CPUs", detect_cpu_signature(), sysconf(_SC_NPROCESSORS_ONLN));
}

IsaLevel highest_built_isa() noexcept { return static_cast<IsaLevel>(ATTEND_HIGHEST_ISA); }

const CpuInfo& cpu_info() {
  static const CpuInfo info = [] {
    CpuInfo machine = detect_cpu();
    machine.best = std::min(machine.best, highest_built_isa());
    return machine;
  }();
  return info;
}

std::vector<IsaLevel> available_isa_levels() {
  std::vector<IsaLevel> levels;
  std::ranges::copy_if(kLevels, std::back_inserter(levels),
                       [](IsaLevel level) { return level <= cpu_info().best; });
  return levels;
}

IsaLevel resolve_isa(std::optional<std::string_view> wanted, std::span<const IsaLevel> available) {
  if (!wanted) return available.back();
  const auto what = fmt::format("ATTEND_ISA={}", *wanted);
  const auto level = parse_isa(*wanted);
  if (!level) {
    throw Unsupported(what, {fmt::format("unknown level; known are {}", join_levels(kLevels))});
  }
  if (std::ranges::find(available, *level) == available.end()) {
    throw Unsupported(
        what, {fmt::format("this machine lacks it; available are {}", join_levels(available))});
  }
  return *level;
}

IsaLevel active_isa() {
  static const IsaLevel level = [] {
    const char* text = std::getenv("ATTEND_ISA");
    const auto wanted = text == nullptr ? std::nullopt : std::optional<std::string_view>(text);
    return resolve_isa(wanted, available_isa_levels());
  }();
  return level;
}

}  // namespace attend
