// SPDX-License-Identifier: Apache-2.0
// What makers and calls of DIFFERENTIAL_FLASH_ATTN refuse, before anything is written.
#include <gmock/gmock.h>

#include <functional>
#include <limits>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "backend/differential_step.h"

namespace attend {
namespace {

using testing::DifferentialOptions;
using testing::DifferentialStep;
using ::testing::HasSubstr;
using testing::HostTensor;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const Backend& backend() { return find_backend("DIFFERENTIAL_FLASH_ATTN"); }

DifferentialOptions of_variant(DifferentialVariant variant) {
  DifferentialOptions o;
  o.variant = variant;
  return o;
}

template <typename Config>
struct Refusal {
  const char* argument;
  std::function<void(Config&)> change;
  const char* text;
};

template <typename Config, typename Make>
void expect_refusals(const char* op, const Config& good, const std::vector<Refusal<Config>>& all,
                     const Make& make) {
  EXPECT_NO_THROW(make(good));
  for (const auto& [argument, change, text] : all) {
    Config bad = good;
    change(bad);
    try {
      make(bad);
      ADD_FAILURE() << "accepted a bad " << argument << ": " << text;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), op) << e.what();
      EXPECT_EQ(e.argument(), argument) << e.what();
      EXPECT_THAT(e.what(), HasSubstr(text));
    }
  }
}

TEST(DifferentialImplErrors, NameTheField) {
  using C = ImplConfig;
  expect_refusals<C>(
      "DIFFERENTIAL_FLASH_ATTN.make_impl",
      DifferentialStep(of_variant(DifferentialVariant::v1)).impl_config,
      {{"differential", [](C& c) { c.differential.reset(); }, "got none"},
       {"attn_type", [](C& c) { c.attn_type = AttentionType::encoder; }, "got encoder"},
       {"num_kv_heads", [](C& c) { c.num_kv_heads = 1; }, "even"},
       {"num_kv_heads", [](C& c) { c.num_kv_heads = 0; }, "even"},
       {"num_q_heads", [](C& c) { c.num_q_heads = 7; }, "num_kv_heads 4"},
       {"num_q_heads", [](C& c) { c.num_q_heads = 6; }, "num_kv_heads 4"},
       {"head_size", [](C& c) { c.head_size = 12; }, "multiple of 8, at most 256"},
       {"head_size", [](C& c) { c.head_size = 264; }, "multiple of 8, at most 256"},
       {"dtype", [](C& c) { c.dtype = DType::i8; }, "got i8"},
       {"kv_cache_dtype", [](C& c) { c.kv_cache_dtype = "bf16"; }, "auto or f32"},
       {"kv_cache_dtype", [](C& c) { c.kv_cache_dtype = "int8_level1"; }, "auto or f32"},
       {"k_scale", [](C& c) { c.k_scale = c.v_scale = {1.0F}; }, "not fp8"},
       {"value_scales", [](C& c) { c.value_scales = {1.0F}; }, "none"},
       {"alibi_slopes", [](C& c) { c.alibi_slopes = {1.0F}; }, "none or 8"},
       {"sinks", [](C& c) { c.sinks = std::vector<float>(8, kNan); }, "nan at index 0"},
       {"sliding_window", [](C& c) { c.sliding_window = 0; }, ">= 1"},
       {"differential.lambda_q1", [](C& c) { c.differential->lambda_q1.clear(); },
        "expected 16 values, got 0"},
       {"differential.lambda_k1", [](C& c) { c.differential->lambda_k1.resize(15); }, "got 15"},
       {"differential.lambda_q2", [](C& c) { c.differential->lambda_q2.resize(32); }, "got 32"},
       {"differential.lambda_k2", [](C& c) { c.differential->lambda_k2[3] = kNan; },
        "nan at index 3"},
       {"differential.lambda_init", [](C& c) { c.differential->lambda_init = kNan; }, "got nan"},
       {"differential.lambda_rounding", [](C& c) { c.differential->lambda_rounding = DType::i8; },
        "got i8"},
       {"differential.norm_weight", [](C& c) { c.differential->norm_weight.resize(16); },
        "expected 32 values, got 16"},
       {"differential.norm_weight", [](C& c) { c.differential->norm_weight[31] = kNan; },
        "nan at index 31"},
       {"differential.norm_weight", [](C& c) { c.differential->norm = false; }, "got 32"},
       {"differential.norm_eps", [](C& c) { c.differential->norm_eps = 0.0F; }, "> 0"}},
      [](const C& c) { backend().make_impl(c); });
}

TEST(DifferentialImplErrors, LambdaMustBeFinite) {
  DifferentialStep step({});
  auto& d = *step.impl_config.differential;
  d.lambda_q1 = d.lambda_k1 = std::vector<float>(16, 10.0F);
  EXPECT_THROW(backend().make_impl(step.impl_config), InvalidArgument);
}

TEST(DifferentialImplErrors, VariantV2HasNeitherVectorsNorNorm) {
  using C = ImplConfig;
  expect_refusals<C>(
      "DIFFERENTIAL_FLASH_ATTN.make_impl",
      DifferentialStep(of_variant(DifferentialVariant::v2)).impl_config,
      {{"num_q_heads", [](C& c) { c.num_q_heads = 4; }, "twice num_kv_heads 4"},
       {"differential.pairing", [](C& c) { c.differential->pairing = HeadPairing::halves; },
        "interleaved"},
       {"differential.lambda_q2",
        [](C& c) { c.differential->lambda_q2 = std::vector<float>(16, 0.1F); }, "got 16"},
       {"differential.lambda_init", [](C& c) { c.differential->lambda_init = 0.8; }, "got 0.8"},
       {"differential.lambda_rounding", [](C& c) { c.differential->lambda_rounding = DType::bf16; },
        "unset"},
       {"differential.norm", [](C& c) { c.differential->norm = true; }, "false"},
       {"differential.norm_weight",
        [](C& c) { c.differential->norm_weight = std::vector<float>(16, 1.0F); }, "none"}},
      [](const C& c) { backend().make_impl(c); });
}

TEST(DifferentialBuilderErrors, NameTheField) {
  using C = BuilderConfig;
  const C good = DifferentialStep(of_variant(DifferentialVariant::v1)).builder_config;
  expect_refusals<C>(
      "DIFFERENTIAL_FLASH_ATTN.make_builder", good,
      {{"differential", [](C& c) { c.differential.reset(); }, "got none"},
       {"attn_type", [](C& c) { c.attn_type = AttentionType::encoder_decoder; }, "decoder"},
       {"cache.format", [](C& c) { c.cache.format = KvFormat::int8_level1; }, "plain"},
       {"num_kv_heads", [](C& c) { c.cache.num_kv_heads = 3; }, "even"},
       {"num_q_heads", [](C& c) { c.num_q_heads = 9; }, "got 9"},
       {"head_size", [](C& c) { c.cache.head_size = 20; }, "got 20"},
       {"cache.dtype", [](C& c) { c.cache.dtype = DType::i32; }, "got i32"},
       {"block_size", [](C& c) { c.cache.block_size = 24; }, "multiple of 16"},
       {"window_left", [](C& c) { c.window_left = -2; }, "got -2"},
       {"num_speculative_tokens", [](C& c) { c.num_speculative_tokens = -1; }, "got -1"},
       {"num_workers", [](C& c) { c.num_workers = 0; }, "got 0"},
       {"max_num_splits", [](C& c) { c.max_num_splits = -1; }, "got -1"}},
      [](const C& c) { backend().make_builder(c); });
  C fast = good;
  fast.arithmetic = Arithmetic::fast;
  EXPECT_THROW(backend().make_builder(fast), Unsupported);
  EXPECT_NO_THROW(([&] {
    fast.arithmetic = Arithmetic::exact;
    backend().make_builder(fast);
  }()));
}

TEST(DifferentialForwardErrors, NameTheArgumentAndLeaveEverything) {
  struct Call {
    DifferentialVariant variant;
    const char* argument;
    std::function<void(ForwardArgs&)> change;
    const char* text;
  };
  constexpr auto kV1 = DifferentialVariant::v1, kV2 = DifferentialVariant::v2;
  const HostTensor wrong(DType::f32, {60, 5, 16}), lambdas(DType::f32, {60, 4});
  const HostTensor other_cache(DType::f32, {2, 2, 9, 32, 2, 16});
  const HostTensor flat_cache(DType::f32, {2, 9, 16, 4, 16});
  for (const Call& call : std::initializer_list<Call>{
           {kV1, "query", [&](ForwardArgs& a) { a.query = wrong; }, "[60, 5, 16]"},
           {kV1, "output", [&](ForwardArgs& a) { a.output = wrong; }, "[60, 5, 16]"},
           {kV2, "output", [&](ForwardArgs& a) { a.output = wrong; }, "[60, 5, 16]"},
           {kV1, "lse", [&](ForwardArgs& a) { a.lse = lambdas; }, "[60, 4]"},
           {kV1, "key", [&](ForwardArgs& a) { a.key = wrong; }, "[60, 5, 16]"},
           {kV1, "value", [&](ForwardArgs& a) { a.value = {}; }, "key and value"},
           {kV1, "key", [&](ForwardArgs& a) { a.key = {}; }, "key and value"},
           {kV1, "query", [&](ForwardArgs& a) { a.query = a.query.slice(0, 0, 45); }, "46 rows"},
           {kV1, "kv_cache", [&](ForwardArgs& a) { a.kv_cache = other_cache; }, "2, 9, 32, 2"},
           {kV1, "kv_cache", [&](ForwardArgs& a) { a.kv_cache = flat_cache; }, "2, 9, 16, 4"},
           {kV2, "kv_cache", [&](ForwardArgs& a) { a.kv_cache = other_cache; }, "2, 9, 32, 2"},
           {kV1, "kv_scale_cache", [&](ForwardArgs& a) { a.kv_scale_cache = lambdas; },
            "undefined"},
           {kV1, "token_lambda", [&](ForwardArgs& a) { a.token_lambda = lambdas; }, "undefined"},
           {kV2, "token_lambda", [&](ForwardArgs& a) { a.token_lambda = {}; }, "variant v2"},
           {kV2, "token_lambda",
            [&](ForwardArgs& a) { a.token_lambda = lambdas.view().slice(0, 0, 45); }, "46 rows"},
       }) {
    for (const bool shares : {false, true}) {
      DifferentialStep step(of_variant(call.variant));
      step.impl_config.shares_kv_cache = shares;
      const std::string argument = call.argument;
      if (shares && (argument == "key" || argument == "value")) continue;
      const auto metadata = step.build();
      step.workspace.reserve(metadata->workspace_bytes());
      const auto cache = step.cache_memory.snapshot(), output = step.output.snapshot();
      ForwardArgs args = step.forward_args();
      call.change(args);
      try {
        backend().make_impl(step.impl_config)->forward(args, metadata.get());
        ADD_FAILURE() << "accepted a bad " << argument << ": " << call.text;
      } catch (const InvalidArgument& e) {
        EXPECT_EQ(e.op(), "DIFFERENTIAL_FLASH_ATTN.forward") << e.what();
        EXPECT_EQ(e.argument(), argument) << e.what();
        EXPECT_THAT(e.what(), HasSubstr(call.text));
      }
      EXPECT_EQ(step.cache_memory.snapshot(), cache);
      EXPECT_EQ(step.output.snapshot(), output);
    }
  }
}

TEST(DifferentialForwardErrors, WhatTheOpRefusesComesBeforeTheCacheIsWritten) {
  DifferentialStep step({});
  const auto metadata = step.build();
  const auto cache = step.cache_memory.snapshot();
  ForwardArgs args = step.forward_args();
  args.workspace = {};
  EXPECT_THROW(backend().make_impl(step.impl_config)->forward(args, metadata.get()),
               InvalidArgument);
  step.block_table.as<std::int32_t>()[0] = 1000;
  EXPECT_THROW(step.forward(*metadata), InvalidArgument);
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
}

TEST(DifferentialForwardErrors, MetadataMustBeOfSuchLayers) {
  DifferentialStep step({});
  const auto refuse = [&](const Metadata& m, const char* text) {
    try {
      step.forward(m);
      ADD_FAILURE() << "accepted: " << text;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), "metadata") << e.what();
      EXPECT_THAT(e.what(), HasSubstr(text));
    }
  };
  BuilderConfig config = step.builder_config;
  refuse(*find_backend("FLASH_ATTN").make_builder(config)->build(0, step.batch),
         "another back end's");
  config.num_q_heads = 16;
  refuse(*backend().make_builder(config)->build(0, step.batch), "16 query heads");
  config = step.builder_config;
  config.window_left = 5;
  refuse(*backend().make_builder(config)->build(0, step.batch), "window (5, -1)");
  config = step.builder_config;
  config.differential->variant = DifferentialVariant::v2;
  refuse(*backend().make_builder(config)->build(0, step.batch), "variant v2");

  const auto builder = backend().make_builder(step.builder_config);
  const auto foreign = find_backend("FLASH_ATTN").make_builder(step.builder_config);
  EXPECT_THROW(builder->update_block_table(*foreign->build(0, step.batch), step.block_table, {}),
               InvalidArgument);
  EXPECT_THROW(builder->refresh(*builder->build(0, step.batch), step.batch), InvalidArgument);
  EXPECT_THROW(builder->build_for_capture(step.batch), Unsupported);
}

}  // namespace
}  // namespace attend
