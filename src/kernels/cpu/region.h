// SPDX-License-Identifier: Apache-2.0
#pragma once
// Opens and closes a region whose functions (templates and lambdas too) are compiled for one
// instruction set. Include every other header BEFORE the region, so that shared inline code keeps
// the baseline: per-file -m flags leak AVX-512 bodies of shared templates into baseline callers.
#define ATTEND_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define ATTEND_REGION_BEGIN(isa) \
  ATTEND_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define ATTEND_REGION_END _Pragma("clang attribute pop")
#else
#define ATTEND_REGION_BEGIN(isa) _Pragma("GCC push_options") ATTEND_PRAGMA(GCC target(isa))
#define ATTEND_REGION_END _Pragma("GCC pop_options")
#endif
