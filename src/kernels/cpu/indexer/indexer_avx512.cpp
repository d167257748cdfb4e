// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attend/core/float_types.h"
#include "kernels/cpu/exp2_poly.h"
#include "kernels/cpu/indexer/indexer.h"
#include "kernels/cpu/inline.h"
#include "kernels/cpu/region.h"

ATTEND_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace attend::cpu::avx512 {
namespace {
#include "kernels/cpu/simd_avx512-inl.h"
//
#include "kernels/cpu/indexer/finish-inl.h"
//
#include "kernels/cpu/indexer/indexer-inl.h"
}  // namespace

extern constinit const IndexerKernel kIndexerKernel = make_indexer_entry(IsaLevel::avx512);
}  // namespace attend::cpu::avx512
ATTEND_REGION_END
