// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/attention/phase.h"

namespace attend::cpu {

PhaseClock*& thread_phase_clock() noexcept {
  thread_local PhaseClock* clock = nullptr;
  return clock;
}

}  // namespace attend::cpu
