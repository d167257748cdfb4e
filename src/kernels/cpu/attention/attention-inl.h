// SPDX-License-Identifier: Apache-2.0
// The kernels for floating-point queries. Included as parts-inl.h is.

#include "kernels/cpu/attention/parts-inl.h"

template <typename T, typename Stored = T, typename Values = Stored>
void run_unit(const AttentionProblem& p, const WorkUnit& u, const KernelWorkspace& ws) noexcept {
  UnitRunner<T, Stored, Values> runner(p, u, ws);
  runner.run(runner, ws.partials);
}

constexpr AttentionKernel make_entry(IsaLevel level) noexcept {
  return {level,
          &run_unit<float>,
          &run_unit<f16>,
          &run_unit<bf16>,
          &run_unit<bf16, fp8_e4m3>,
          &run_unit<bf16, fp8_e5m2>,
          &run_unit<bf16, std::int8_t>,
          &run_unit<bf16, CodedByte, bf16>,
          &reduce_unit<float>,
          &reduce_unit<f16>,
          &reduce_unit<bf16>,
          &combine_maps_unit};
}
