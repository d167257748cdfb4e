// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string_view>

namespace attend {

/// Size and alignment of the huge pages that caches and large buffers ask for.
inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

/// Who gets transparent huge pages. unknown: the system has none or does not say; always: all
/// memory; madvise: memory that asks for them, as that of this library does; never: nobody.
enum class HugePageMode : std::uint8_t { unknown, always, madvise, never };
std::string_view to_string(HugePageMode mode) noexcept;

/// Reads the file "enabled" of `root`, a copy of /sys/kernel/mm/transparent_hugepage.
HugePageMode read_huge_page_mode(const std::filesystem::path& root);

/// The mode of this machine. It can change while a program runs and is read anew each time.
HugePageMode huge_page_mode();

/// Bytes of [data, data + size) that lie in huge pages now, as /proc/self/smaps counts them; 0 if
/// it does not say. The kernel walks all memory of the process for it: milliseconds and more.
/// @pre The range is a whole mapping of its own, as that of CacheMemory is.
std::size_t count_huge_page_bytes(const void* data, std::size_t size);

}  // namespace attend
