// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "attend/core/float_types.h"
#include "kernels/cpu/inline.h"
#include "kernels/cpu/matmul/matmul.h"
#include "kernels/cpu/region.h"

ATTEND_REGION_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512bf16,amx-tile,amx-bf16")
namespace attend::cpu::amx {
namespace {
#include "kernels/cpu/attention/amx_tiles-inl.h"
//
#include "kernels/cpu/matmul/matmul_amx-inl.h"
}  // namespace

extern constinit const MatmulKernel kMatmulKernel = {.isa = IsaLevel::amx,
                                                     .multiply_bf16 = &multiply_part};
}  // namespace attend::cpu::amx
ATTEND_REGION_END
