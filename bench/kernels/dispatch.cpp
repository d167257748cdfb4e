// SPDX-License-Identifier: Apache-2.0
#include "attend/core/cpu.h"
#include "bench/kernels/kernels.h"

namespace attend::bench {

CeilingKernels ceiling_kernels() {
  CeilingKernels k{&scalar::fma_loop, nullptr, nullptr, nullptr, &scalar::read_loop};
#if defined(__x86_64__)
  const IsaLevel best = cpu_info().best;
  if (best >= IsaLevel::avx2) {
    k.fma = &avx2::fma_loop;
    k.read = &avx2::read_loop;
  }
  if (best >= IsaLevel::avx512) {
    k.fma = &avx512::fma_loop;
    k.read = &avx512::read_loop;
  }
  if (best >= IsaLevel::avx512_vnni) k.int8_dot = &avx512::int8_dot_loop;
  if (best >= IsaLevel::avx512_spr) k.bf16_dot = &avx512::bf16_dot_loop;
  if (best >= IsaLevel::amx) k.bf16_tile = &amx::bf16_tile_loop;
#endif
  return k;
}

}  // namespace attend::bench
