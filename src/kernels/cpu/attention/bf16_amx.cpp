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

ATTEND_REGION_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512bf16,amx-tile,amx-bf16")
namespace attend::cpu::amx {
namespace {
#include "kernels/cpu/simd_avx512-inl.h"
//
#include "kernels/cpu/simd_vbmi-inl.h"
//
#include "kernels/cpu/attention/parts-inl.h"
//
#include "kernels/cpu/attention/amx_tiles-inl.h"
//
#include "kernels/cpu/attention/amx_unit-inl.h"
}  // namespace

extern constinit const AttentionKernel kAttentionKernel = {
    .isa = IsaLevel::amx,
    .run_unit_bf16 = &run_amx_unit<bf16>,
    .run_unit_e4m3 = &run_amx_unit<fp8_e4m3>,
    .run_unit_e5m2 = &run_amx_unit<fp8_e5m2>,
    .run_unit_i8 = &run_amx_unit<std::int8_t>,
    .run_unit_coded = &run_amx_unit<CodedByte, bf16>,
};
}  // namespace attend::cpu::amx
ATTEND_REGION_END
