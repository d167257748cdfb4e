// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "kernels/cpu/matmul/matmul.h"

namespace attend::cpu {

#define ATTEND_MATMUL_KERNEL(ns)           \
  namespace ns {                           \
  extern const MatmulKernel kMatmulKernel; \
  }
#include "kernels/cpu/matmul/kernels.inc"
#undef ATTEND_MATMUL_KERNEL

namespace {

#define ATTEND_MATMUL_KERNEL(ns) &ns::kMatmulKernel,
constexpr std::array kKernels = {
#include "kernels/cpu/matmul/kernels.inc"
};
#undef ATTEND_MATMUL_KERNEL

MultiplyFn multiply_in(const MatmulKernel& kernel, DType dtype) noexcept {
  if (dtype == DType::f16) return kernel.multiply_f16;
  return dtype == DType::bf16 ? kernel.multiply_bf16 : kernel.multiply_f32;
}

}  // namespace

MultiplyFn multiply_of(IsaLevel level, DType dtype) noexcept {
  MultiplyFn function = nullptr;
  for (const MatmulKernel* kernel : kKernels) {
    if (kernel->isa <= level) function = multiply_in(*kernel, dtype);
    if (function != nullptr) break;
  }
  return function;
}

}  // namespace attend::cpu
