// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "attend/cache/kv_cache_spec.h"
#include "attend/core/cpu.h"
#include "attend/core/dtype.h"
#include "attend/plan/arithmetic.h"
#include "attend/plan/attention_plan.h"

/// Which level's kernels attend, where a caller names none: the highest one that the machine has,
/// or what `attend tune` found to be faster and stored (docs/adr/0018-tuned-levels-are-stored.md).
namespace attend {

/// Attention that has kernels of its own. The first six are for queries of floating-point types, by
/// the type of keys and values, fp8_ds_mla rows being of kind fp8_e4m3; the others for int8 queries
/// and keys, by the type of the values.
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
/// The same for a layer that computes in `dtype` with a cache that holds `stored` elements in a
/// format. @pre A back end takes them together.
KernelKind kernel_kind(DType dtype, DType stored, KvFormat format) noexcept;

/// Queries and keys are multiplied as integers, in the one way that there is for them.
constexpr bool is_integer(KernelKind kind) noexcept { return kind >= KernelKind::int8_level1; }
/// Whether the kernels of a level for a kind are those of Arithmetic::fast.
bool has_fast_kernel(IsaLevel level, KernelKind kind) noexcept;
/// What the kernels of a level do for a kind: "exact", "fast" or "integer".
std::string_view arithmetic_name(IsaLevel level, KernelKind kind) noexcept;

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

/// Whether a kind can be attended to with this arithmetic by kernels of `level` or below.
bool is_served(Arithmetic arithmetic, IsaLevel level, KernelKind kind) noexcept;
/// Level of the kernels that do this arithmetic for a kind: `level`, or the highest below it whose
/// kernels are exact if they must be. Allocates nothing. @throws Unsupported, in the name of `op`,
/// unless is_served().
IsaLevel arithmetic_level(Arithmetic arithmetic, IsaLevel level, KernelKind kind,
                          std::string_view op = "arithmetic_level");

/// Level of the kernels that run `plan` for problems of a kind: the plan's if its maker named one,
/// else that of kernel_choice(), and below it where the plan's arithmetic wants so.
/// @throws Unsupported as arithmetic_level().
IsaLevel kernel_level(const AttentionPlan& plan, KernelKind kind,
                      std::string_view op = "kernel_level");

}  // namespace attend
