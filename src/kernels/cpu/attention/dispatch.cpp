// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/attention/attention.h"

namespace attend::cpu {

#define ATTEND_ATTENTION_KERNEL(ns, level)           \
  namespace ns {                                     \
  AttentionKernel attention_kernel_entry() noexcept; \
  }
#include "kernels/cpu/attention/kernels.inc"
#undef ATTEND_ATTENTION_KERNEL

std::span<const AttentionKernel> attention_kernels() noexcept {
#define ATTEND_ATTENTION_KERNEL(ns, level) ns::attention_kernel_entry(),
  static const AttentionKernel all[] = {
#include "kernels/cpu/attention/kernels.inc"
  };
#undef ATTEND_ATTENTION_KERNEL
  return all;
}

const AttentionKernel& attention_kernel(IsaLevel level) noexcept {
  const auto all = attention_kernels();
  for (const AttentionKernel& kernel : all)
    if (kernel.isa <= level) return kernel;
  return all.back();
}

}  // namespace attend::cpu
