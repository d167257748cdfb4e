// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>

#include "attend/core/cpu.h"
#include "attend/plan/arithmetic.h"

namespace attend {

/// Which kernels an op that plans for itself runs; either part can stand for the whole. A planned
/// call has both in its plan.
struct KernelOptions {
  std::optional<IsaLevel> isa;  ///< highest level; unset = that of kernel_choice()
  /// Arithmetic::fast is Unsupported where there are no fast kernels.
  Arithmetic arithmetic = Arithmetic::automatic;

  KernelOptions() = default;
  KernelOptions(IsaLevel level) : isa(level) {}
  KernelOptions(std::optional<IsaLevel> level) : isa(level) {}
  KernelOptions(Arithmetic a) : arithmetic(a) {}
  KernelOptions(std::optional<IsaLevel> level, Arithmetic a) : isa(level), arithmetic(a) {}
};

}  // namespace attend
