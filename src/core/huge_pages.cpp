// SPDX-License-Identifier: Apache-2.0
#include "attend/core/huge_pages.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <optional>
#include <string>

#include "core/huge_mapping.h"
#include "core/small_file.h"

namespace attend {
namespace {

std::size_t guard_bytes() noexcept { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

std::size_t whole_pages(std::size_t bytes) noexcept {
  return (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
}

struct Range {
  std::uintptr_t begin = 0, end = 0;
};

// Of "7f00-7fff rw-p ...", which begins a mapping; other lines begin with a name and a colon.
std::optional<Range> parse_range(std::string_view line) noexcept {
  Range range;
  const char* const last = line.data() + line.size();
  const auto first = std::from_chars(line.data(), last, range.begin, 16);
  if (first.ec != std::errc{} || first.ptr == last || *first.ptr != '-') return std::nullopt;
  if (std::from_chars(first.ptr + 1, last, range.end, 16).ec != std::errc{}) return std::nullopt;
  return range;
}

}  // namespace

std::string_view to_string(HugePageMode mode) noexcept {
  switch (mode) {
    case HugePageMode::unknown:
      return "unknown";
    case HugePageMode::always:
      return "always";
    case HugePageMode::madvise:
      return "madvise";
    case HugePageMode::never:
      return "never";
  }
  return "invalid mode of huge pages";
}

HugePageMode read_huge_page_mode(const std::filesystem::path& root) {
  constexpr std::size_t kMaxBytes = 256;
  const SmallFile file = read_small_file(root / "enabled", kMaxBytes);
  for (const auto mode : {HugePageMode::always, HugePageMode::madvise, HugePageMode::never}) {
    const std::string chosen = fmt::format("[{}]", to_string(mode));
    if (file.text.find(chosen) != std::string::npos) return mode;
  }
  return HugePageMode::unknown;
}

HugePageMode huge_page_mode() { return read_huge_page_mode("/sys/kernel/mm/transparent_hugepage"); }

std::size_t count_huge_page_bytes(const void* data, std::size_t size) {
  const auto from = reinterpret_cast<std::uintptr_t>(data);
  std::ifstream maps("/proc/self/smaps");
  std::size_t kib = 0;
  Range mapping;
  for (std::string line; std::getline(maps, line);) {
    if (const auto range = parse_range(line)) mapping = *range;
    constexpr std::string_view kKey = "AnonHugePages:";
    if (mapping.begin >= from + size || mapping.end <= from || !line.starts_with(kKey)) continue;
    kib += std::stoull(line.substr(kKey.size()));
  }
  return kib * 1024;
}

HugeMapping map_huge_pages(std::size_t bytes, bool huge) noexcept {
  // mmap aligns to its own pages only: reserve addresses for one huge page more, then open the
  // aligned part in the middle and give the rest back but for the guards.
  const std::size_t guard = guard_bytes();
  const std::size_t size = whole_pages(bytes);
  const std::size_t reserved = size + kHugePageBytes + 2 * guard;
  void* const base = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return {};
  auto* const begin = static_cast<std::byte*>(base);
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(base) + guard;
  const std::size_t head = whole_pages(first) - first;
  std::byte* const data = begin + guard + head;
  if (head > 0) munmap(begin, head);
  munmap(data + size + guard, kHugePageBytes - head);
  HugeMapping mapping{data, 0};
  if (mprotect(data, size, PROT_READ | PROT_WRITE) != 0) {
    unmap_huge_pages(data, bytes);
    return {};
  }
  if (huge && madvise(data, size, MADV_HUGEPAGE) != 0) mapping.advice_error = errno;
  return mapping;
}

void unmap_huge_pages(void* data, std::size_t bytes) noexcept {
  const std::size_t guard = guard_bytes();
  munmap(static_cast<std::byte*>(data) - guard, whole_pages(bytes) + 2 * guard);
}

}  // namespace attend
