// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>

#include "attend/core/executor.h"

/// What this machine can do at best, measured now: every speed is reported as a share of one of
/// these.
namespace attend::bench {

/// All workers together. 0 = the instructions are not there.
struct Ceilings {
  double fma_gflops = 0.0;       ///< float32 fused multiply-adds in registers, 2 operations each
  double bf16_dot_gflops = 0.0;  ///< vdpbf16ps, 4 operations a lane
  double int8_dot_gops = 0.0;    ///< vpdpbusd, 8 operations a lane
  double read_gbps = 0.0;  ///< sequential read of `buffer_bytes`, median pass, 1e9 bytes a second
  /// Reads of the same bytes in runs of kRunBytes whose places are shuffled, each line fetched a
  /// run ahead: what a cache of small blocks allows.
  double run_read_gbps = 0.0;
  double lost_fraction = 0.0;  ///< time that other programs took meanwhile
  int attempts = 1;            ///< times that all of them were measured; these are the quietest
};

/// 32 keys of 128 16-bit numbers: one head of a block in the layout [heads, block_size, dim].
inline constexpr std::size_t kRunBytes = 8192;

/// Measures all of them once, `seconds_each` a figure.
Ceilings measure_ceilings(Executor& executor, std::size_t buffer_bytes, double seconds_each);

/// Single figures, for measuring beside a case.
double measure_fma_gflops(Executor& executor, double seconds);
/// What the indexer's kernels of the active level multiply with: tiles of bf16 where it has AMX,
/// else float32.
double measure_indexer_gflops(Executor& executor, double seconds);
/// Of the best instructions that there are: float32 ones where int8 dot products are missing.
double measure_int8_gops(Executor& executor, double seconds);
double measure_read_gbps(Executor& executor, std::size_t buffer_bytes, double seconds);
double measure_run_read_gbps(Executor& executor, std::size_t buffer_bytes, double seconds);

}  // namespace attend::bench
