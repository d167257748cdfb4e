// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "kernels/cpu/attention/attention.h"

namespace attend::cpu {

// Entries are constants, not functions: a function of a level's file is compiled for that level, so
// that merely asking it for its entry would end the program on a lesser CPU.
#define ATTEND_ATTENTION_KERNEL(ns)              \
  namespace ns {                                 \
  extern const AttentionKernel kAttentionKernel; \
  }
#include "kernels/cpu/attention/kernels.inc"
#undef ATTEND_ATTENTION_KERNEL

#define ATTEND_INT8_ATTENTION_KERNEL(ns)                 \
  namespace ns {                                         \
  extern const Int8AttentionKernel kInt8AttentionKernel; \
  }
#include "kernels/cpu/attention/int8_kernels.inc"
#undef ATTEND_INT8_ATTENTION_KERNEL

namespace {

#define ATTEND_ATTENTION_KERNEL(ns) &ns::kAttentionKernel,
constexpr std::array kKernels = {
#include "kernels/cpu/attention/kernels.inc"
};
#undef ATTEND_ATTENTION_KERNEL

#define ATTEND_INT8_ATTENTION_KERNEL(ns) &ns::kInt8AttentionKernel,
constexpr std::array kInt8Kernels = {
#include "kernels/cpu/attention/int8_kernels.inc"
};
#undef ATTEND_INT8_ATTENTION_KERNEL

// The function that `get` finds in the best of the `kernels` up to `level` that has it. Never null
// after the last kernel: the scalar one has every function.
auto best_of(const auto& kernels, IsaLevel level, auto get) noexcept {
  decltype(get(*kernels.front())) function = nullptr;
  for (const auto* kernel : kernels) {
    if (kernel->isa <= level) function = get(*kernel);
    if (function != nullptr) break;
  }
  return function;
}

}  // namespace

CombineMapsFn combine_maps_of(IsaLevel level) noexcept {
  return best_of(kKernels, level,
                 [&](const AttentionKernel& kernel) { return kernel.combine_maps; });
}

RunUnitFn run_unit_of(IsaLevel level, const AttentionProblem& problem) noexcept {
  if (problem.q_dtype == DType::i8) {
    return best_of(kInt8Kernels, level, [&](const Int8AttentionKernel& kernel) {
      return kernel.run_unit(problem.v_dtype);
    });
  }
  return best_of(kKernels, level,
                 [&](const AttentionKernel& kernel) { return kernel.run_unit(problem.k_dtype); });
}

ReduceFn reduce_of(IsaLevel level, DType out) noexcept {
  return best_of(kKernels, level,
                 [&](const AttentionKernel& kernel) { return kernel.reduce(out); });
}

}  // namespace attend::cpu
