// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attend/core/cpu.h"

namespace attend {

/// Registers of the x86 feature queries, as the CPU and the operating system report them. Plain
/// data, so that the decision below can be tested on any machine.
struct X86Features {
  std::uint32_t leaf1_ecx = 0;
  std::uint32_t leaf7_ebx = 0;    ///< cpuid leaf 7, subleaf 0
  std::uint32_t leaf7_ecx = 0;    ///< cpuid leaf 7, subleaf 0
  std::uint32_t leaf7_edx = 0;    ///< cpuid leaf 7, subleaf 0
  std::uint32_t leaf7_1_eax = 0;  ///< cpuid leaf 7, subleaf 1
  std::uint64_t xcr0 = 0;  ///< register states that the operating system saves; 0 without OSXSAVE
  bool tiles_permitted = false;  ///< the operating system lets this process use the tile registers
};

/// Highest level whose instructions exist and whose registers the operating system saves and lets
/// this process use.
IsaLevel best_isa(const X86Features& f) noexcept;

/// Whether the permission decides about the level amx, so that asking for it is worthwhile.
bool tiles_need_permission(const X86Features& f) noexcept;

}  // namespace attend
