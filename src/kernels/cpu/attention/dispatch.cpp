// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/attention/attention.h"

namespace attend::cpu {

// Entries are constants, not functions: a function of a level's file is compiled for that level, so
// that merely asking it for its entry would end the program on a lesser CPU.
#define ATTEND_ATTENTION_KERNEL(ns, level)       \
  namespace ns {                                 \
  extern const AttentionKernel kAttentionKernel; \
  }
#include "kernels/cpu/attention/kernels.inc"
#undef ATTEND_ATTENTION_KERNEL

#define ATTEND_INT8_ATTENTION_KERNEL(ns, level)          \
  namespace ns {                                         \
  extern const Int8AttentionKernel kInt8AttentionKernel; \
  }
#include "kernels/cpu/attention/int8_kernels.inc"
#undef ATTEND_INT8_ATTENTION_KERNEL

const AttentionKernel& attention_kernel(IsaLevel level) noexcept {
#define ATTEND_ATTENTION_KERNEL(ns, lowest) \
  if (IsaLevel::lowest <= level) return ns::kAttentionKernel;
#include "kernels/cpu/attention/kernels.inc"
#undef ATTEND_ATTENTION_KERNEL
  return scalar::kAttentionKernel;
}

const Int8AttentionKernel& int8_attention_kernel(IsaLevel level) noexcept {
#define ATTEND_INT8_ATTENTION_KERNEL(ns, lowest) \
  if (IsaLevel::lowest <= level) return ns::kInt8AttentionKernel;
#include "kernels/cpu/attention/int8_kernels.inc"
#undef ATTEND_INT8_ATTENTION_KERNEL
  return scalar::kInt8AttentionKernel;
}

}  // namespace attend::cpu
