// SPDX-License-Identifier: Apache-2.0
// What all attention kernels are made of, in order. Included inside an ISA region and namespace,
// after every other include, with Simd defined.

inline constexpr float kLog2e = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

#include "kernels/cpu/attention/problem-inl.h"
//
#include "kernels/cpu/attention/gemm-inl.h"
//
#include "kernels/cpu/attention/softmax-inl.h"
//
#include "kernels/cpu/attention/finish-inl.h"
//
#include "kernels/cpu/attention/stored-inl.h"
//
#include "kernels/cpu/attention/pair-inl.h"
//
#include "kernels/cpu/attention/reduce-inl.h"
//
#include "kernels/cpu/attention/rows-inl.h"
//
#include "kernels/cpu/attention/unit-inl.h"
