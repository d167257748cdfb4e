// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace attend {

/// Instruction-set levels, each including the ones before it.
/// avx512 = F, BW, VL, DQ; avx512_vnni adds VNNI; avx512_spr adds BF16, FP16, VBMI; amx adds
/// AMX-TILE, AMX-BF16, AMX-INT8 and the permission of Linux to use the tiles.
enum class IsaLevel : std::uint8_t { scalar, avx2, avx512, avx512_vnni, avx512_spr, amx };

std::string_view to_string(IsaLevel level) noexcept;
std::optional<IsaLevel> parse_isa(std::string_view name) noexcept;

/// What cpuid and the operating system say about this machine.
struct CpuInfo {
  std::string model;                 ///< brand string; empty if unknown
  IsaLevel best = IsaLevel::scalar;  ///< that the machine has, and the library was built with
  std::int64_t l1d_bytes = 0;        ///< per core; 0 if unknown
  std::int64_t l2_bytes = 0;         ///< per core; 0 if unknown
  std::int64_t l3_bytes = 0;         ///< shared; 0 if unknown
};
/// The first call asks Linux for the permission to use tiles if the CPU has them, for all threads
/// of the process. From then on sigaltstack() refuses stacks that could not hold the tiles.
const CpuInfo& cpu_info();

/// Levels this machine can run, ascending; always starts with scalar.
std::vector<IsaLevel> available_isa_levels();

/// Highest level of the kernels unless a plan names one: ATTEND_ISA if set, else the best
/// available. kernel_choice() may have a lower one for some types.
/// @throws Unsupported if ATTEND_ISA names an unknown level or one this machine lacks.
IsaLevel active_isa();

}  // namespace attend
