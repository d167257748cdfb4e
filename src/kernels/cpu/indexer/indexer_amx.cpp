// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attend/core/float_types.h"
#include "kernels/cpu/exp2_poly.h"
#include "kernels/cpu/fp8_tables.h"
#include "kernels/cpu/indexer/indexer.h"
#include "kernels/cpu/inline.h"
#include "kernels/cpu/region.h"

ATTEND_REGION_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512bf16,amx-tile,amx-bf16")
namespace attend::cpu::amx {
namespace {
#include "kernels/cpu/simd_avx512-inl.h"
//
#include "kernels/cpu/simd_vbmi-inl.h"
//
#include "kernels/cpu/attention/amx_tiles-inl.h"
//
#include "kernels/cpu/indexer/finish-inl.h"
//
#include "kernels/cpu/indexer/indexer_amx-inl.h"
}  // namespace

extern constinit const IndexerKernel kIndexerKernel = {
    .isa = IsaLevel::amx,
    .key_bytes = kIndexerDim * sizeof(bf16),
    .head_bytes = kIndexerDim * sizeof(bf16),
    .pack = &pack_keys,
    .logits = &row_logits,
};
}  // namespace attend::cpu::amx
ATTEND_REGION_END
