// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "bench/kernels/kernels.h"
#include "kernels/cpu/inline.h"
#include "kernels/cpu/region.h"

ATTEND_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,amx-tile,amx-bf16")
namespace attend::bench::amx {
namespace {
#include "kernels/cpu/attention/amx_tiles-inl.h"
}  // namespace

double bf16_tile_loop(std::int64_t rounds) noexcept {
  shape_tiles(kTileDim);
  clear_tile<0>();
  clear_tile<1>();
  clear_tile<2>();
  clear_tile<3>();
  clear_tile<4>();
  clear_tile<5>();
  clear_tile<6>();
  clear_tile<7>();
  for (std::int64_t r = 0; r < rounds; ++r) {
    multiply_bf16<0, 4, 6>();
    multiply_bf16<1, 4, 7>();
    multiply_bf16<2, 5, 6>();
    multiply_bf16<3, 5, 7>();
  }
  release_tiles();
  return 4.0 * 2 * kTileDim * kTileDim * 32 * static_cast<double>(rounds);
}

}  // namespace attend::bench::amx
ATTEND_REGION_END
