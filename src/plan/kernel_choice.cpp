// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/kernel_choice.h"

#include <fmt/format.h>

#include <cstdlib>

#include "attend/core/error.h"
#include "core/cpu_detect.h"
#include "plan/kernel_choice_file.h"

namespace attend {
namespace {

/// Why a kind cannot be attended to, with what arithmetic it is asked for, and what would help.
std::string why_not_served(IsaLevel level, KernelKind kind) {
  if (is_integer(kind))
    return "int8 queries and keys are multiplied as integers, which has no modes";
  if (!has_fast_kernel(IsaLevel::amx, kind)) {
    return fmt::format(
        "fast kernels multiply bf16, which cannot hold {} keys; those of bf16, fp8_e4m3, fp8_e5m2 "
        "and int8_per_token_head have fast kernels at level amx",
        to_string(kind));
  }
  return fmt::format("the kernels of level {} for {} are exact; those of amx are fast, {}",
                     to_string(level), to_string(kind),
                     cpu_info().best >= IsaLevel::amx
                         ? "and isa or ATTEND_ISA can name that level"
                         : "but this machine does not have that level");
}

}  // namespace

std::string_view to_string(KernelKind kind) noexcept {
  switch (kind) {
    case KernelKind::f32:
      return "f32";
    case KernelKind::f16:
      return "f16";
    case KernelKind::bf16:
      return "bf16";
    case KernelKind::fp8_e4m3:
      return "fp8_e4m3";
    case KernelKind::fp8_e5m2:
      return "fp8_e5m2";
    case KernelKind::int8_per_token_head:
      return "int8_per_token_head";
    case KernelKind::int8_level1:
      return "int8_level1";
    case KernelKind::int8_level2_f16:
      return "int8_level2_f16";
    case KernelKind::int8_level2_bf16:
      return "int8_level2_bf16";
  }
  return "invalid kind of kernel";
}

KernelKind kernel_kind(DType q, DType k, DType v) noexcept {
  if (q == DType::i8) {
    return v == DType::i8    ? KernelKind::int8_level1
           : v == DType::f16 ? KernelKind::int8_level2_f16
                             : KernelKind::int8_level2_bf16;
  }
  switch (k) {
    case DType::f32:
      return KernelKind::f32;
    case DType::f16:
      return KernelKind::f16;
    case DType::fp8_e4m3:
    case DType::u8:
      return KernelKind::fp8_e4m3;
    case DType::fp8_e5m2:
      return KernelKind::fp8_e5m2;
    case DType::i8:
      return KernelKind::int8_per_token_head;
    default:
      return KernelKind::bf16;
  }
}

KernelKind kernel_kind(DType dtype, DType stored, KvFormat format) noexcept {
  switch (format) {
    case KvFormat::int8_level1:
      return kernel_kind(DType::i8, stored, stored);
    case KvFormat::int8_level2:
      return kernel_kind(DType::i8, stored, dtype);
    default:
      return kernel_kind(dtype, stored, stored);
  }
}

std::string_view to_string(ChoiceSource source) noexcept {
  switch (source) {
    case ChoiceSource::highest:
      return "highest";
    case ChoiceSource::file:
      return "file";
    case ChoiceSource::environment:
      return "environment";
  }
  return "invalid source of a choice";
}

KernelChoice plan::choose(const char* attend_isa, const std::filesystem::path& path,
                          const ChoiceMachine& machine) {
  KernelChoice choice;
  if (attend_isa != nullptr) {
    choice.source = ChoiceSource::environment;
    choice.levels.fill(resolve_isa(attend_isa, machine.levels));
    return choice;
  }
  choice.levels.fill(machine.levels.back());
  choice.file = path.string();
  if (path.empty()) return choice;
  StoredChoice stored = read_choice(path, machine);
  choice.problem = std::move(stored.problem);
  if (stored.levels) {
    choice.source = ChoiceSource::file;
    choice.levels = *stored.levels;
  }
  return choice;
}

const KernelChoice& kernel_choice() {
  static const KernelChoice choice =
      plan::choose(std::getenv("ATTEND_ISA"), plan::choice_path(), plan::this_machine());
  return choice;
}

bool has_fast_kernel(IsaLevel level, KernelKind kind) noexcept {
  return level >= IsaLevel::amx && !is_integer(kind) && kind != KernelKind::f32 &&
         kind != KernelKind::f16;
}

std::string_view arithmetic_name(IsaLevel level, KernelKind kind) noexcept {
  if (is_integer(kind)) return "integer";
  return to_string(has_fast_kernel(level, kind) ? Arithmetic::fast : Arithmetic::exact);
}

bool is_served(Arithmetic arithmetic, IsaLevel level, KernelKind kind) noexcept {
  if (arithmetic == Arithmetic::automatic) return true;
  return !is_integer(kind) && (arithmetic == Arithmetic::exact || has_fast_kernel(level, kind));
}

IsaLevel arithmetic_level(Arithmetic arithmetic, IsaLevel level, KernelKind kind,
                          std::string_view op) {
  if (!is_served(arithmetic, level, kind)) {
    throw Unsupported(
        fmt::format("[{}] argument 'arithmetic': expected {}, got {}", op,
                    is_integer(kind) ? "automatic" : "automatic or exact", to_string(arithmetic)),
        {why_not_served(level, kind)});
  }
  // Levels are consecutive, and a machine that has one has all below it.
  while (arithmetic == Arithmetic::exact && has_fast_kernel(level, kind))
    level = static_cast<IsaLevel>(static_cast<int>(level) - 1);
  return level;
}

IsaLevel kernel_level(const AttentionPlan& plan, KernelKind kind, std::string_view op) {
  return arithmetic_level(plan.arithmetic, plan.isa_given ? plan.isa : kernel_choice().level(kind),
                          kind, op);
}

}  // namespace attend
