// SPDX-License-Identifier: Apache-2.0
// All parts of the attention kernel in order. Included inside an ISA region and namespace, after
// every other include, with Simd defined.

inline constexpr float kLog2e = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

#include "kernels/cpu/attention/problem-inl.h"
//
#include "kernels/cpu/attention/gemm-inl.h"
//
#include "kernels/cpu/attention/softmax-inl.h"
//
#include "kernels/cpu/attention/finish-inl.h"
//
#include "kernels/cpu/attention/unit-inl.h"

template <typename T, typename Stored = T>
void run_unit(const AttentionProblem& p, const WorkUnit& u, const KernelWorkspace& ws) noexcept {
  UnitRunner<T, Stored> runner(p, u, ws);
  runner.run(ws.partials);
}

constexpr AttentionKernel make_entry(IsaLevel level) noexcept {
  return {level,
          &run_unit<float>,
          &run_unit<f16>,
          &run_unit<bf16>,
          &run_unit<bf16, fp8_e4m3>,
          &run_unit<bf16, fp8_e5m2>,
          &reduce_unit<float>,
          &reduce_unit<f16>,
          &reduce_unit<bf16>};
}
