// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>
#include <vector>

#include "attend/core/executor.h"
#include "attend/plan/kernel_choice.h"

/// Which levels are fastest here: the measurement behind `attend tune`.
namespace attend::bench {

/// Shortest times of one level's kernels.
struct LevelTimes {
  IsaLevel isa = IsaLevel::scalar;  ///< lowest level that has these kernels
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
};

/// What was measured of a kind.
struct KindTimes {
  KernelKind kind = KernelKind::f32;
  std::vector<LevelTimes> levels;  ///< ascending
  IsaLevel chosen = IsaLevel::scalar;
};

struct Tuning {
  std::vector<KindTimes> kinds;  ///< as kKernelKinds
  double lost_fraction = 0.0;    ///< as measure_lost_fraction()
  int attempts = 1;              ///< the quietest of so many measurements
  KernelLevels levels() const;
};

/// A lower level is chosen only if it takes at least this much less time than the highest, so that
/// two levels that are alike do not take turns.
inline constexpr double kTuneMargin = 0.05;

/// The level with the smallest product of both times; see kTuneMargin.
/// @pre `levels` ascends and is not empty.
IsaLevel choose_level(std::span<const LevelTimes> levels);

/// Levels with kernels of their own for a kind, ascending; scalar only where there is no other.
std::vector<IsaLevel> distinct_levels(KernelKind kind);

/// How much is timed; this much takes less than a second on a quiet machine.
struct TuneSize {
  int prefill_tokens = 512;  ///< of a prompt
  int decode_keys = 2048;    ///< of a request
  int rounds = 5;            ///< that count, after one that warms up
};

/// Times small prefills and decodes with the kernels of every level, on all workers; repeats all of
/// it twice at most if other programs disturb it.
Tuning tune(Executor& executor, const TuneSize& size = {});

}  // namespace attend::bench
