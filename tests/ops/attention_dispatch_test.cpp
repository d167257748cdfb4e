// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "attend/plan/kernel_choice.h"
#include "core/cpu_detect.h"
#include "kernels/cpu/attention/attention.h"

namespace attend {
namespace {

using cpu::reduce_of;
using enum IsaLevel;

// Asking for a level's kernels needs no CPU that could run them.
constexpr IsaLevel kLevels[] = {scalar, avx2, avx512, avx512_vnni, avx512_spr, amx};

cpu::RunUnitFn run_unit(IsaLevel level, DType q, DType k, DType v) {
  cpu::AttentionProblem problem;
  problem.q_dtype = q;
  problem.k_dtype = k;
  problem.v_dtype = v;
  return run_unit_of(level, problem);
}
cpu::RunUnitFn float_queries(IsaLevel level, DType keys) {
  return run_unit(level, DType::bf16, keys, keys);
}
cpu::RunUnitFn int8_queries(IsaLevel level, DType values) {
  return run_unit(level, DType::i8, DType::i8, values);
}

TEST(AttentionDispatch, EveryLevelServesEveryType) {
  for (const IsaLevel level : kLevels) {
    SCOPED_TRACE(to_string(level));
    for (const DType keys :
         {DType::f32, DType::f16, DType::bf16, DType::fp8_e4m3, DType::fp8_e5m2, DType::i8}) {
      EXPECT_NE(float_queries(level, keys), nullptr) << to_string(keys);
    }
    for (const DType values : {DType::i8, DType::f16, DType::bf16}) {
      EXPECT_NE(int8_queries(level, values), nullptr) << to_string(values);
    }
    for (const DType out : {DType::f32, DType::f16, DType::bf16}) {
      EXPECT_NE(reduce_of(level, out), nullptr) << to_string(out);
    }
  }
}

#if defined(__x86_64__)
TEST(AttentionDispatch, AKernelOfItsOwnIsPreferred) {
  if (highest_built_isa() < amx) GTEST_SKIP() << "built without the kernels of amx";
  for (const DType keys : {DType::fp8_e4m3, DType::fp8_e5m2}) {
    EXPECT_NE(float_queries(avx512_spr, keys), float_queries(avx512_vnni, keys));
  }
  EXPECT_NE(float_queries(avx512, DType::bf16), float_queries(avx2, DType::bf16));
  EXPECT_NE(float_queries(avx2, DType::bf16), float_queries(scalar, DType::bf16));
  EXPECT_NE(int8_queries(avx512_vnni, DType::i8), int8_queries(avx512, DType::i8));
  EXPECT_NE(reduce_of(avx512, DType::f32), reduce_of(avx2, DType::f32));
}

// The plan cannot look at the kernels, so it has a list of its own.
TEST(AttentionDispatch, FastKernelsAreThoseOfTiles) {
  if (highest_built_isa() < amx) GTEST_SKIP() << "built without the kernels of amx";
  for (const DType keys :
       {DType::f32, DType::f16, DType::bf16, DType::fp8_e4m3, DType::fp8_e5m2, DType::i8}) {
    const KernelKind kind = kernel_kind(DType::bf16, keys, keys);
    EXPECT_EQ(has_fast_kernel(amx, kind),
              float_queries(amx, keys) != float_queries(avx512_spr, keys))
        << to_string(kind);
    for (const IsaLevel level : {scalar, avx2, avx512, avx512_vnni, avx512_spr})
      EXPECT_FALSE(has_fast_kernel(level, kind)) << to_string(level);
  }
}

TEST(AttentionDispatch, WhatALevelLacksIsTakenFromTheNextBelow) {
  for (const DType keys : {DType::f32, DType::f16, DType::bf16, DType::i8}) {
    EXPECT_EQ(float_queries(avx512_spr, keys), float_queries(avx512, keys)) << to_string(keys);
  }
  EXPECT_EQ(float_queries(avx512_vnni, DType::fp8_e4m3), float_queries(avx512, DType::fp8_e4m3));
  EXPECT_EQ(int8_queries(avx512_spr, DType::bf16), int8_queries(avx512_vnni, DType::bf16));
  EXPECT_EQ(reduce_of(avx512_spr, DType::bf16), reduce_of(avx512, DType::bf16));
}
#endif

}  // namespace
}  // namespace attend
