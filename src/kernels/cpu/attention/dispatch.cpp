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

#if defined(__x86_64__)
namespace avx512_spr {
extern const Fp8AttentionKernel kFp8AttentionKernel;
}
#endif

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

RunUnitFn run_unit_of(IsaLevel level, const AttentionProblem& problem) noexcept {
  if (problem.q_dtype == DType::i8) return int8_attention_kernel(level).run_unit(problem.v_dtype);
#if defined(__x86_64__)
  const Fp8AttentionKernel& fp8 = avx512_spr::kFp8AttentionKernel;
  if (level >= IsaLevel::avx512_spr && problem.k_dtype == DType::fp8_e4m3) return fp8.run_unit_e4m3;
  if (level >= IsaLevel::avx512_spr && problem.k_dtype == DType::fp8_e5m2) return fp8.run_unit_e5m2;
#endif
  return attention_kernel(level).run_unit(problem.k_dtype);
}

}  // namespace attend::cpu
