// SPDX-License-Identifier: Apache-2.0
#pragma once
// Register tiles only work if everything around them is one function.
#define ATTEND_INLINE inline __attribute__((always_inline))
#define ATTEND_LAMBDA __attribute__((always_inline))
#define ATTEND_NOINLINE __attribute__((noinline))
