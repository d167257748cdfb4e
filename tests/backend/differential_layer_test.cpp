// SPDX-License-Identifier: Apache-2.0
// Layers of DIFFERENTIAL_FLASH_ATTN against the oracle.
#include <gmock/gmock.h>

#include <cmath>
#include <functional>
#include <limits>

#include "attend/backend/selector.h"
#include "backend/differential_step.h"

namespace attend {
namespace {

using testing::DifferentialOptions;
using testing::DifferentialStep;

struct Feature {
  const char* name;
  std::function<void(DifferentialOptions&)> set;
};

class DifferentialLayer : public ::testing::TestWithParam<Feature> {};

TEST_P(DifferentialLayer, WritesTheCacheAndAgreesWithTheOracle) {
  DifferentialOptions o;
  GetParam().set(o);
  DifferentialStep step(o);
  step.run();
  step.expect_oracle();
  step.expect_cache();
}

INSTANTIATE_TEST_SUITE_P(
    Features, DifferentialLayer,
    ::testing::Values(
        Feature{"plain", [](DifferentialOptions&) {}},
        Feature{"halves", [](DifferentialOptions& o) { o.pairing = HeadPairing::halves; }},
        Feature{"v2", [](DifferentialOptions& o) { o.variant = DifferentialVariant::v2; }},
        Feature{"v2_bf16_layered",
                [](DifferentialOptions& o) {
                  o.variant = DifferentialVariant::v2;
                  o.dtype = DType::bf16;
                  o.num_kv_heads = 1;
                  o.num_layers = 2;
                }},
        Feature{"f16", [](DifferentialOptions& o) { o.dtype = DType::f16; }},
        Feature{"bf16_hnd_layered",
                [](DifferentialOptions& o) {
                  o.dtype = DType::bf16;
                  o.layout = KvLayout::hnd;
                  o.num_layers = 3;
                  o.num_kv_heads = 2;
                  o.head_size = 40;
                }},
        Feature{"long_context", [](DifferentialOptions& o) { o.context_lens = {700, 300, 0}; }},
        Feature{"window", [](DifferentialOptions& o) { o.sliding_window = 9; }},
        Feature{"softcap_alibi_sinks",
                [](DifferentialOptions& o) {
                  o.softcap = 5.0F;
                  o.alibi_slopes = {0.5F, 0.3F, 0.1F, 0.01F, 0.2F, 0.4F, 0.6F, 0.05F};
                  o.sinks = {0.5F, -1.0F, 2.0F, 0.0F, 1.0F, 1.5F, -0.5F, 3.0F};
                }},
        Feature{"causal_per_request",
                [](DifferentialOptions& o) { o.request_causal = {1, 0, 1}; }}),
    [](const auto& info) { return std::string(info.param.name); });

class DifferentialFp8 : public ::testing::TestWithParam<std::tuple<const char*, HeadPairing>> {};

TEST_P(DifferentialFp8, AttendsToWhatTheCacheHolds) {
  DifferentialOptions o;
  std::tie(o.kv_cache_dtype, o.pairing) = GetParam();
  o.dtype = DType::bf16;
  o.query_lens = {300, 20, 61};
  o.context_lens = {0, 0, 0};
  o.num_q_heads = 8;
  DifferentialStep step(o);
  step.run_parts({{0, 0, 130}, {2, 0, 60}});
  step.run_parts({{2, 60, 61}, {0, 130, 300}, {1, 0, 20}});
  step.expect_oracle();
  step.expect_cache();
}

INSTANTIATE_TEST_SUITE_P(Formats, DifferentialFp8,
                         ::testing::Combine(::testing::Values("fp8_e4m3", "fp8_e5m2"),
                                            ::testing::Values(HeadPairing::interleaved,
                                                              HeadPairing::halves)));

TEST(DifferentialLambda, IsThatOfTheLayerWithItsRounding) {
  DifferentialOptions o;
  o.dtype = DType::bf16;
  DifferentialStep exact(o), rounded(o);
  exact.run();
  rounded.impl_config.differential->lambda_rounding = DType::bf16;
  rounded.run();
  EXPECT_NE(exact.output.snapshot(), rounded.output.snapshot());
  EXPECT_EQ(exact.lse.snapshot(), rounded.lse.snapshot());
}

TEST(DifferentialSharedCache, GivesTheBitsOfTheProducerAndWritesNothing) {
  for (const auto variant : {DifferentialVariant::v1, DifferentialVariant::v2}) {
    DifferentialOptions o;
    o.variant = variant;
    DifferentialStep step(o);
    step.run();
    const auto cache = step.cache_memory.snapshot();
    const auto output = step.output.snapshot(), lse = step.lse.snapshot();
    step.impl_config.shares_kv_cache = true;
    const auto impl = find_backend("DIFFERENTIAL_FLASH_ATTN").make_impl(step.impl_config);
    const auto builder = find_backend("DIFFERENTIAL_FLASH_ATTN").make_builder(step.builder_config);
    const auto own = builder->build(0, step.batch);
    const auto moved = builder->update_block_table(*own, step.block_table, {});
    step.key.fill_bytes(0xFF);
    step.value.fill_bytes(0xFF);
    // The producer's metadata, or with the table of another group and no slots.
    for (const Metadata* metadata : {own.get(), moved.get()}) {
      for (const bool with_keys : {true, false}) {
        step.output.fill_bytes(0xFF);
        step.lse.fill_bytes(0xFF);
        ForwardArgs args = step.forward_args();
        if (!with_keys) args.key = args.value = {};
        impl->forward(args, metadata);
        EXPECT_EQ(step.output.snapshot(), output);
        EXPECT_EQ(step.lse.snapshot(), lse);
        EXPECT_EQ(step.cache_memory.snapshot(), cache);
      }
    }
  }
}

TEST(DifferentialProfiling, WithoutMetadataTheResultIsThatOfNoKeys) {
  for (const auto variant : {DifferentialVariant::v1, DifferentialVariant::v2}) {
    DifferentialOptions o;
    o.variant = variant;
    DifferentialStep step(o);
    const auto cache = step.cache_memory.snapshot();
    find_backend("DIFFERENTIAL_FLASH_ATTN")
        .make_impl(step.impl_config)
        ->forward(step.forward_args(), nullptr);
    EXPECT_THAT(step.output.as<float>(), ::testing::Each(0.0F));
    EXPECT_THAT(step.lse.as<float>(), ::testing::Each(-std::numeric_limits<float>::infinity()));
    EXPECT_EQ(step.cache_memory.snapshot(), cache);
  }
}

}  // namespace
}  // namespace attend
