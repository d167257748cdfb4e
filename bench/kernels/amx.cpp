// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "bench/kernels/kernels.h"
#include "kernels/cpu/inline.h"
#include "kernels/cpu/region.h"

ATTEND_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,amx-tile,amx-bf16")
namespace attend::bench::amx {
namespace {
#include "kernels/cpu/attention/amx_tiles-inl.h"

constexpr int kFactors = 4;

/// Random bf16 numbers of magnitude 1 to 2: products of zeros take less power, and so less time,
/// than those of any data.
void fill_factors(std::uint16_t (&tiles)[kFactors][kTileDim][kTileRowBytes / 2]) {
  std::uint32_t state = 1;
  for (auto& tile : tiles)
    for (auto& row : tile)
      for (std::uint16_t& x : row) {
        state = state * 1664525U + 1013904223U;
        x = static_cast<std::uint16_t>(0x3f80U | (state >> 16 & 0x807fU));
      }
}

}  // namespace

double bf16_tile_loop(std::int64_t rounds) noexcept {
  alignas(64) std::uint16_t factors[kFactors][kTileDim][kTileRowBytes / 2];
  fill_factors(factors);
  shape_tiles(kTileDim);
  clear_tile<0>();
  clear_tile<1>();
  clear_tile<2>();
  clear_tile<3>();
  load_tile<4>(factors[0], kTileRowBytes);
  load_tile<5>(factors[1], kTileRowBytes);
  load_tile<6>(factors[2], kTileRowBytes);
  load_tile<7>(factors[3], kTileRowBytes);
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
