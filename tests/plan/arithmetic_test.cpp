// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/arithmetic.h"

#include <gmock/gmock.h>

#include <set>

#include "attend/core/error.h"
#include "attend/plan/kernel_choice.h"

namespace attend {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;
using enum IsaLevel;

constexpr Arithmetic kModes[] = {Arithmetic::automatic, Arithmetic::exact, Arithmetic::fast};
// What a level would do can be asked on any machine.
constexpr IsaLevel kLevels[] = {scalar, avx2, avx512, avx512_vnni, avx512_spr, amx};

TEST(ArithmeticNames, AreReadAsTheyAreWritten) {
  std::set<std::string_view> names;
  for (const Arithmetic a : kModes) {
    names.insert(to_string(a));
    EXPECT_EQ(parse_arithmetic(to_string(a)), a);
  }
  EXPECT_EQ(names.size(), std::size(kModes));
  for (const char* name : {"", "auto", "Fast", "exact "})
    EXPECT_EQ(parse_arithmetic(name), std::nullopt);
}

TEST(KernelKinds, OfACacheAreThoseOfItsTypes) {
  EXPECT_EQ(kernel_kind(DType::f32, DType::fp8_e5m2, KvFormat::plain), KernelKind::fp8_e5m2);
  EXPECT_EQ(kernel_kind(DType::f16, DType::i8, KvFormat::int8_per_token_head),
            KernelKind::int8_per_token_head);
  EXPECT_EQ(kernel_kind(DType::f16, DType::i8, KvFormat::int8_level1), KernelKind::int8_level1);
  EXPECT_EQ(kernel_kind(DType::f16, DType::i8, KvFormat::int8_level2), KernelKind::int8_level2_f16);
  EXPECT_EQ(kernel_kind(DType::bf16, DType::i8, KvFormat::int8_level2),
            KernelKind::int8_level2_bf16);
}

TEST(ArithmeticLevel, AutomaticIsTheLevelItself) {
  for (const KernelKind kind : kKernelKinds)
    for (const IsaLevel level : kLevels)
      EXPECT_EQ(arithmetic_level(Arithmetic::automatic, level, kind), level);
}

TEST(ArithmeticLevel, ExactIsTheHighestWithoutFastKernels) {
  for (const KernelKind kind : {KernelKind::bf16, KernelKind::fp8_e4m3, KernelKind::fp8_e5m2,
                                KernelKind::int8_per_token_head}) {
    EXPECT_EQ(arithmetic_level(Arithmetic::exact, amx, kind), avx512_spr) << to_string(kind);
    EXPECT_EQ(arithmetic_level(Arithmetic::exact, avx512_spr, kind), avx512_spr);
    EXPECT_EQ(arithmetic_level(Arithmetic::exact, avx2, kind), avx2);
    EXPECT_EQ(arithmetic_level(Arithmetic::fast, amx, kind), amx);
    EXPECT_EQ(arithmetic_name(amx, kind), "fast");
    EXPECT_EQ(arithmetic_name(avx512_spr, kind), "exact");
  }
  for (const KernelKind kind : {KernelKind::f32, KernelKind::f16}) {
    for (const IsaLevel level : kLevels)
      EXPECT_EQ(arithmetic_level(Arithmetic::exact, level, kind), level);
    EXPECT_EQ(arithmetic_name(amx, kind), "exact");
  }
  EXPECT_EQ(arithmetic_name(amx, KernelKind::int8_level2_f16), "integer");
}

TEST(ArithmeticLevel, ThrowsWhereItIsNotServedAndOnlyThere) {
  for (const Arithmetic a : kModes) {
    for (const KernelKind kind : kKernelKinds) {
      for (const IsaLevel level : kLevels) {
        SCOPED_TRACE(std::string(to_string(a)) + " " + std::string(to_string(kind)) + " " +
                     std::string(to_string(level)));
        if (is_served(a, level, kind)) {
          EXPECT_NO_THROW(arithmetic_level(a, level, kind));
        } else {
          EXPECT_THROW(arithmetic_level(a, level, kind), Unsupported);
        }
      }
    }
  }
}

TEST(ArithmeticLevel, ErrorsNameOpArgumentKindAndWhatWouldHelp) {
  const auto asking = [](Arithmetic a, IsaLevel level, KernelKind kind) {
    return [=] { arithmetic_level(a, level, kind, "some_op"); };
  };
  EXPECT_THAT(
      asking(Arithmetic::fast, avx2, KernelKind::bf16),
      ThrowsMessage<Unsupported>(AllOf(
          HasSubstr("[some_op] argument 'arithmetic': expected automatic or exact, "
                    "got fast: the kernels of level avx2 for bf16 are exact"),
          HasSubstr("those of amx are fast"),
          HasSubstr(cpu_info().best >= amx ? "can name that level" : "not have that level"))));
  EXPECT_THAT(asking(Arithmetic::fast, amx, KernelKind::f16),
              ThrowsMessage<Unsupported>(
                  AllOf(HasSubstr("cannot hold f16 keys"), HasSubstr("int8_per_token_head"))));
  for (const Arithmetic a : {Arithmetic::exact, Arithmetic::fast}) {
    EXPECT_THAT(asking(a, amx, KernelKind::int8_level1),
                ThrowsMessage<Unsupported>(AllOf(HasSubstr("expected automatic, got"),
                                                 HasSubstr("multiplied as integers"))));
  }
}

TEST(KernelLevel, ObeysTheArithmeticOfThePlan) {
  const std::vector<std::int32_t> starts = {0, 1}, lens = {5};
  AttentionPlanInput in;
  in.query_start_loc = starts;
  in.seq_lens = lens;
  in.num_q_heads = in.num_kv_heads = 1;
  in.head_dim_qk = in.head_dim_v = 8;
  in.arithmetic = Arithmetic::exact;
  AttentionPlan plan = plan_attention(in);
  EXPECT_EQ(kernel_level(plan, KernelKind::bf16),
            arithmetic_level(Arithmetic::exact, kernel_choice().level(KernelKind::bf16),
                             KernelKind::bf16));
  plan.isa = amx;  // need not be there to be asked for
  plan.isa_given = true;
  EXPECT_EQ(kernel_level(plan, KernelKind::bf16), avx512_spr);
  EXPECT_EQ(kernel_level(plan, KernelKind::f32), amx);
  EXPECT_THROW(kernel_level(plan, KernelKind::int8_level1), Unsupported);
  in.arithmetic = Arithmetic::fast;
  in.isa = scalar;
  EXPECT_THROW(kernel_level(plan_attention(in), KernelKind::bf16), Unsupported);
}

}  // namespace
}  // namespace attend
