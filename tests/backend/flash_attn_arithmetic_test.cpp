// SPDX-License-Identifier: Apache-2.0
// FLASH_ATTN hands the arithmetic of its configuration to every plan, or refuses it at once.
#include <gmock/gmock.h>

#include <algorithm>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "attend/plan/kernel_choice.h"
#include "backend/flash_attn_step.h"
#include "backends/flash_attn/metadata.h"

namespace attend {
namespace {

using flash_attn::FlashAttnMetadata;
using ::testing::HasSubstr;
using testing::HostTensor;
using testing::Step;
using testing::StepOptions;

bool chosen_is_fast() {
  return has_fast_kernel(kernel_choice().level(KernelKind::bf16), KernelKind::bf16);
}

StepOptions bf16_step() {
  StepOptions o;
  o.dtype = DType::bf16;
  o.query_lens = {1, 5, 40};
  o.context_lens = {700, 640, 660};
  o.shared_keys = 640;
  return o;
}

const AttentionPlan& plan_of(const Metadata& m) {
  return *dynamic_cast<const FlashAttnMetadata&>(m).plan;
}

std::vector<unsigned char> run(Arithmetic arithmetic, CascadeMode cascade = CascadeMode::off) {
  Step step(bf16_step());
  step.builder_config.arithmetic = arithmetic;
  step.builder_config.cascade = cascade;
  step.run();
  step.expect_oracle();
  return step.output.snapshot();
}

TEST(FlashAttnArithmetic, DecidesAboutTheBits) {
  const auto exact = run(Arithmetic::exact), automatic = run(Arithmetic::automatic);
  EXPECT_EQ(exact == automatic, !chosen_is_fast());
  EXPECT_EQ(run(Arithmetic::exact, CascadeMode::always), exact);
  if (chosen_is_fast()) {
    EXPECT_EQ(run(Arithmetic::fast), automatic);
  }
}

// What the layer gives is what the op gives with these kernels.
TEST(FlashAttnArithmetic, IsThatOfTheOp) {
  Step step(bf16_step());
  step.builder_config.arithmetic = Arithmetic::exact;
  step.run();
  const HostTensor out(DType::bf16, {46, 4, 16});
  FlashAttnVarlenArgs a;
  a.q = step.query.view().slice(0, 0, 46);
  a.k = step.cache.select(0, 0);
  a.v = step.cache.select(0, 1);
  a.out = out;
  a.query_start_loc = {step.batch.query_start_loc.data(), DType::i32, {4}};
  a.seq_lens = {step.batch.seq_lens.data(), DType::i32, {3}};
  a.block_table = step.block_table.view().slice(0, 0, 3);
  a.params.causal = true;
  const IsaLevel level = arithmetic_level(
      Arithmetic::exact, kernel_choice().level(KernelKind::bf16), KernelKind::bf16);
  flash_attn_varlen(a, nullptr, level);
  const auto layer = step.output.snapshot(), op = out.snapshot();
  EXPECT_TRUE(std::equal(op.begin(), op.end(), layer.begin()));
}

TEST(FlashAttnArithmetic, IsInEveryPlanThatABuilderMakes) {
  Step step(bf16_step());
  step.builder_config.arithmetic = Arithmetic::exact;
  step.builder_config.cascade = CascadeMode::always;
  step.builder_config.capture = {.max_reqs = 8, .max_tokens = 64, .max_seq_len = 6000};
  const auto builder = find_backend("FLASH_ATTN").make_builder(step.builder_config);
  const auto metadata = builder->build(0, step.batch);
  EXPECT_FALSE(plan_of(*metadata).shared_prefixes.empty());
  EXPECT_EQ(plan_of(*metadata).arithmetic, Arithmetic::exact);
  EXPECT_EQ(plan_of(*builder->build_for_capture(step.batch)).arithmetic, Arithmetic::exact);
  // Another table in which the requests share nothing: the plan is made again.
  HostTensor table(DType::i32, {3, step.block_table.view().shape[1]});
  for (std::size_t i = 0; i < table.as<std::int32_t>().size(); ++i)
    table.as<std::int32_t>()[i] = static_cast<std::int32_t>(i);
  const auto flat = builder->update_block_table(*metadata, table, {});
  EXPECT_TRUE(plan_of(*flat).shared_prefixes.empty());
  EXPECT_EQ(plan_of(*flat).arithmetic, Arithmetic::exact);
}

TEST(FlashAttnArithmetic, WhatTheCacheDoesNotHaveIsRefusedByTheBuilder) {
  const auto refuses = [](Arithmetic arithmetic, DType dtype, KvFormat format) {
    BuilderConfig config = Step({}).builder_config;
    config.cache.dtype = dtype;
    config.cache.format = format;
    config.arithmetic = arithmetic;
    try {
      find_backend("FLASH_ATTN").make_builder(config);
      return false;
    } catch (const Unsupported& e) {
      EXPECT_THAT(e.what(), HasSubstr("[FLASH_ATTN.make_builder] argument 'arithmetic'"));
      return true;
    }
  };
  for (const DType dtype : {DType::f32, DType::f16}) {
    EXPECT_TRUE(refuses(Arithmetic::fast, dtype, KvFormat::plain));
    EXPECT_FALSE(refuses(Arithmetic::exact, dtype, KvFormat::plain));
  }
  EXPECT_EQ(refuses(Arithmetic::fast, DType::bf16, KvFormat::plain), !chosen_is_fast());
  EXPECT_EQ(refuses(Arithmetic::fast, DType::fp8_e4m3, KvFormat::plain), !chosen_is_fast());
  EXPECT_FALSE(refuses(Arithmetic::exact, DType::i8, KvFormat::int8_per_token_head));
  for (const KvFormat format : {KvFormat::int8_level1, KvFormat::int8_level2}) {
    EXPECT_TRUE(refuses(Arithmetic::exact, DType::i8, format));
    EXPECT_TRUE(refuses(Arithmetic::fast, DType::i8, format));
    EXPECT_FALSE(refuses(Arithmetic::automatic, DType::i8, format));
  }
}

}  // namespace
}  // namespace attend
