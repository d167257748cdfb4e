// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/kernel_choice.h"

#include <cstdlib>

#include "core/cpu_detect.h"
#include "plan/kernel_choice_file.h"

namespace attend {

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
      return KernelKind::fp8_e4m3;
    case DType::fp8_e5m2:
      return KernelKind::fp8_e5m2;
    case DType::i8:
      return KernelKind::int8_per_token_head;
    default:
      return KernelKind::bf16;
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

IsaLevel kernel_level(const AttentionPlan& plan, KernelKind kind) {
  return plan.isa_given ? plan.isa : kernel_choice().level(kind);
}

}  // namespace attend
