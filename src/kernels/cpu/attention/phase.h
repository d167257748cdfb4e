// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__)
#include <chrono>
#endif

#include "kernels/cpu/inline.h"

/// Where the time of a worker goes, for measurements: without a clock a kernel looks at a null
/// pointer a few times for each piece of keys.
namespace attend::cpu {

/// What a kernel is doing. Whatever is woven into a multiplication counts as that.
enum class Phase : std::uint8_t {
  outside,  ///< not in a kernel
  rows,     ///< reading queries, writing outputs
  pack,     ///< finding, decoding and packing keys and values
  qk,
  softmax,
  pv,
  merge,  ///< storing and merging partial results
};
inline constexpr std::size_t kNumPhases = 7;

/// A counter that every worker reads alike, of a constant rate.
ATTEND_INLINE std::uint64_t tick_count() noexcept {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#else
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

/// Ticks of one worker in each phase.
struct PhaseClock {
  std::uint64_t ticks[kNumPhases] = {};  // no std::array: kernels share no template with other code
  std::uint64_t last = 0;                ///< when `now` began
  Phase now = Phase::outside;

  /// From now on the worker is in phase `next`; returns the one before.
  ATTEND_INLINE Phase enter(Phase next) noexcept {
    const std::uint64_t time = tick_count();
    ticks[static_cast<std::size_t>(now)] += time - last;
    last = time;
    const Phase before = now;
    now = next;
    return before;
  }
};

/// Clock of the calls that this thread works for; null = they are not measured.
PhaseClock*& thread_phase_clock() noexcept;

}  // namespace attend::cpu
