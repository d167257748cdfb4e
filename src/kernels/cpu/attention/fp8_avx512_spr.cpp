// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attend/core/float_types.h"
#include "kernels/cpu/attention/attention.h"
#include "kernels/cpu/exp2_poly.h"
#include "kernels/cpu/fp8_tables.h"
#include "kernels/cpu/inline.h"
#include "kernels/cpu/region.h"

#define ATTEND_HALF_VECTOR 1
#define ATTEND_BF16_PAIRS 1
#define ATTEND_VBMI 1

ATTEND_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi")
namespace attend::cpu::avx512_spr {
namespace {
#include "kernels/cpu/simd_avx512-inl.h"
//
#include "kernels/cpu/simd_vbmi-inl.h"
//
#include "kernels/cpu/attention/attention-inl.h"
}  // namespace

extern constinit const AttentionKernel kAttentionKernel = {
    .isa = IsaLevel::avx512_spr,
    .run_unit_e4m3 = &run_unit<bf16, fp8_e4m3>,
    .run_unit_e5m2 = &run_unit<bf16, fp8_e5m2>,
    .run_unit_coded = &run_unit<bf16, CodedByte, bf16>,
};
}  // namespace attend::cpu::avx512_spr
ATTEND_REGION_END
