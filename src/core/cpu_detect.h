// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "attend/core/cpu.h"

namespace attend {

/// Highest level whose kernels are in this build; a machine may run lower ones only.
IsaLevel highest_built_isa() noexcept;

/// Asks this machine; one implementation per processor family (cpu_x86.cpp, cpu_generic.cpp).
CpuInfo detect_cpu();

/// What tells CPUs with other speeds or instructions apart, but for how many there are; one
/// implementation per processor family.
std::string detect_cpu_signature();

/// The same with the number of CPUs: equal on equal machines, and no model name.
std::string cpu_identity();

/// Fills the cache sizes that are still 0 with what the operating system says.
void add_os_cache_sizes(CpuInfo& info) noexcept;

/// The level that a value of ATTEND_ISA (nullopt = unset) stands for among `available` (ascending).
/// @throws Unsupported for an unknown or unavailable level.
IsaLevel resolve_isa(std::optional<std::string_view> wanted, std::span<const IsaLevel> available);

}  // namespace attend
