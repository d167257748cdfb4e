// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "attend/core/cpu.h"
#include "attend/core/dtype.h"
#include "attend/plan/attention_plan.h"

/// Which level's kernels attend, where a caller names none: the highest one that the machine has,
/// or what `attend tune` found to be faster and stored (docs/adr/0018-tuned-levels-are-stored.md).
namespace attend {

/// Attention that has kernels of its own. The first six are for queries of floating-point types, by
/// the type of keys and values; the others for int8 queries and keys, by the type of the values.
enum class KernelKind : std::uint8_t {
  f32,
  f16,
  bf16,
  fp8_e4m3,
  fp8_e5m2,
  int8_per_token_head,
  int8_level1,
  int8_level2_f16,
  int8_level2_bf16
};
inline constexpr std::size_t kNumKernelKinds = 9;
inline constexpr std::array kKernelKinds = {
    KernelKind::f32,
    KernelKind::f16,
    KernelKind::bf16,
    KernelKind::fp8_e4m3,
    KernelKind::fp8_e5m2,
    KernelKind::int8_per_token_head,
    KernelKind::int8_level1,
    KernelKind::int8_level2_f16,
    KernelKind::int8_level2_bf16,
};
static_assert(kKernelKinds.size() == kNumKernelKinds);
std::string_view to_string(KernelKind kind) noexcept;

/// The kind that attends with these types of queries, keys and values.
/// @pre An op takes them together.
KernelKind kernel_kind(DType q, DType k, DType v) noexcept;

/// A level for each kind, indexed by it.
using KernelLevels = std::array<IsaLevel, kNumKernelKinds>;

/// Why the levels of a KernelChoice are what they are. highest: nothing else was said; file: they
/// were measured and stored; environment: ATTEND_ISA.
enum class ChoiceSource : std::uint8_t { highest, file, environment };
std::string_view to_string(ChoiceSource source) noexcept;

/// The levels that this process uses.
struct KernelChoice {
  ChoiceSource source = ChoiceSource::highest;
  KernelLevels levels = {};  ///< none above active_isa()
  /// The file that was looked for; empty with ATTEND_ISA, or where no cache folder is known.
  std::string file;
  std::string problem;  ///< why a file that is there was not used; empty if it was or there is none

  IsaLevel level(KernelKind kind) const noexcept { return levels[static_cast<std::size_t>(kind)]; }
};

/// Chosen when it is first asked for, and the same until the process ends: levels decide about
/// bits.
/// @throws Unsupported as active_isa() does.
const KernelChoice& kernel_choice();

/// Level of the kernels that run `plan` for problems of a kind: the plan's if its maker named one,
/// else that of kernel_choice().
IsaLevel kernel_level(const AttentionPlan& plan, KernelKind kind);

}  // namespace attend
