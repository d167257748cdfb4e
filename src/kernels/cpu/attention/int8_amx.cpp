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
#include "kernels/cpu/inline.h"
#include "kernels/cpu/region.h"

#define ATTEND_HALF_VECTOR 1
#define ATTEND_BF16_PAIRS 1
#define ATTEND_VNNI 1

ATTEND_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vnni,amx-tile,amx-int8")
namespace attend::cpu::amx {
namespace {
#include "kernels/cpu/simd_avx512-inl.h"
//
#include "kernels/cpu/dot_generic-inl.h"
//
#include "kernels/cpu/dot_avx512-inl.h"
//
#include "kernels/cpu/attention/int8_attention-inl.h"
//
#include "kernels/cpu/attention/amx_tiles-inl.h"
//
#include "kernels/cpu/attention/int8_amx_unit-inl.h"
}  // namespace

extern constinit const Int8AttentionKernel kInt8AttentionKernel = {
    .isa = IsaLevel::amx,
    .run_unit_i8 = &run_int8_amx_unit,
};
}  // namespace attend::cpu::amx
ATTEND_REGION_END
