// SPDX-License-Identifier: Apache-2.0
// Whatever is wrong with a prefill call, nothing is written.
#include <gmock/gmock.h>

#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "backend/mla_prefill_call.h"

namespace attend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::HostTensor;
using testing::PrefillCall;
using testing::PrefillOptions;

template <typename Args>
struct BadCall {
  const char* label;
  const char* argument;
  std::function<void(PrefillCall&, Args&)> change;
};
template <typename Args>
void PrintTo(const BadCall<Args>& b, std::ostream* os) {
  *os << b.label;
}

template <typename Error, typename Run>
void expect_refused(const PrefillCall& call, Run run, std::function<void(const Error&)> check) {
  const auto out = call.wide_out.snapshot();
  const auto lse = call.lse.snapshot();
  try {
    run();
    ADD_FAILURE() << "no exception";
  } catch (const Error& e) {
    check(e);
  }
  EXPECT_EQ(call.wide_out.snapshot(), out);
  EXPECT_EQ(call.lse.snapshot(), lse);
}

PrefillOptions options_for(const char* platform, bool causal) {
  PrefillOptions o;
  o.platform = platform;
  o.causal = causal;
  if (!causal) o.key_lens = {0, 17, 290};
  return o;
}

class MlaPrefillBadNewTokens : public ::testing::TestWithParam<BadCall<NewTokensArgs>> {};

TEST_P(MlaPrefillBadNewTokens, ThrowsAndWritesNothing) {
  for (const char* platform : {"cpu", "cuda:8.0"}) {
    PrefillCall call(options_for(platform, true));
    NewTokensArgs args = call.new_tokens();
    GetParam().change(call, args);
    expect_refused<InvalidArgument>(
        call, [&] { call.impl->run_prefill_new_tokens(args); },
        [&](const InvalidArgument& e) {
          EXPECT_EQ(e.argument(), GetParam().argument) << e.what();
        });
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, MlaPrefillBadNewTokens,
    ::testing::Values(
        BadCall<NewTokensArgs>{"no_plan", "plan", [](auto&, auto& a) { a.plan = nullptr; }},
        BadCall<NewTokensArgs>{"plan_of_other_heads", "plan",
                               [](auto& c, auto&) { c.plan.num_q_heads = 4; }},
        BadCall<NewTokensArgs>{"plan_of_grouped_heads", "plan",
                               [](auto& c, auto&) { c.plan.num_kv_heads = 1; }},
        BadCall<NewTokensArgs>{"plan_of_other_keys", "plan",
                               [](auto& c, auto&) { c.plan.head_dim_qk = 128; }},
        BadCall<NewTokensArgs>{"plan_of_other_values", "plan",
                               [](auto& c, auto&) { c.plan.head_dim_v = 160; }},
        BadCall<NewTokensArgs>{"plan_with_a_window", "plan",
                               [](auto& c, auto&) { c.plan.window_left = 3; }},
        BadCall<NewTokensArgs>{"plan_of_a_chunk", "plan",
                               [](auto& c, auto&) { c.plan.request_causal[1] = 0; }},
        BadCall<NewTokensArgs>{"q_undefined", "q", [](auto&, auto& a) { a.q = {}; }},
        BadCall<NewTokensArgs>{"q_dtype", "q", [](auto&, auto& a) { a.q.dtype = DType::f16; }},
        BadCall<NewTokensArgs>{"q_head_size", "q", [](auto&, auto& a) { a.q.shape[2] = 128; }},
        BadCall<NewTokensArgs>{"q_heads", "q", [](auto&, auto& a) { a.q.shape[1] = 1; }},
        BadCall<NewTokensArgs>{"q_rows", "q", [](auto&, auto& a) { a.q.shape[0] -= 1; }},
        BadCall<NewTokensArgs>{"q_device", "q",
                               [](auto&, auto& a) { a.q.device.type = DeviceType::rocm; }},
        BadCall<NewTokensArgs>{"k_head_size", "k", [](auto&, auto& a) { a.k.shape[2] = 128; }},
        BadCall<NewTokensArgs>{"k_stride", "k", [](auto&, auto& a) { a.k.strides[2] = 2; }},
        BadCall<NewTokensArgs>{"k_rows", "k",
                               [](auto&, auto& a) { a.k.shape[0] = a.v.shape[0] = 100; }},
        BadCall<NewTokensArgs>{"v_padded_by_the_caller", "v",
                               [](auto&, auto& a) { a.v.shape[2] = 192; }},
        BadCall<NewTokensArgs>{"v_rows", "v", [](auto&, auto& a) { a.v.shape[0] -= 1; }},
        BadCall<NewTokensArgs>{"v_undefined", "v", [](auto&, auto& a) { a.v = {}; }},
        BadCall<NewTokensArgs>{"out_undefined", "out", [](auto&, auto& a) { a.out = {}; }},
        BadCall<NewTokensArgs>{"out_with_the_padding", "out",
                               [](auto&, auto& a) { a.out.shape[2] = 136; }},
        BadCall<NewTokensArgs>{"out_rows", "out", [](auto&, auto& a) { a.out.shape[0] -= 1; }},
        BadCall<NewTokensArgs>{"out_rows_alias", "out",
                               [](auto&, auto& a) { a.out.strides[0] = 0; }},
        BadCall<NewTokensArgs>{"out_codes_without_scale", "out",
                               [](auto&, auto& a) { a.out.dtype = DType::fp8_e4m3; }},
        BadCall<NewTokensArgs>{"out_in_v", "out", [](auto& c, auto& a) { a.v.data = c.out.data; }},
        BadCall<NewTokensArgs>{"out_in_lse", "out",
                               [](auto& c, auto& a) { a.lse.data = c.out.data; }},
        BadCall<NewTokensArgs>{"lse_in_v", "lse",
                               [](auto& c, auto& a) { a.v.data = c.lse.view().data; }},
        BadCall<NewTokensArgs>{"lse_rows", "lse", [](auto&, auto& a) { a.lse.shape[0] -= 1; }},
        BadCall<NewTokensArgs>{"lse_dtype", "lse", [](auto&, auto& a) { a.lse.dtype = DType::i32; }},
        BadCall<NewTokensArgs>{"workspace_null", "workspace",
                               [](auto&, auto& a) { a.workspace.data = nullptr; }},
        BadCall<NewTokensArgs>{"workspace_small", "workspace",
                               [](auto&, auto& a) { a.workspace.size -= 1; }},
        BadCall<NewTokensArgs>{"carry_goes_on", "carry",
                               [](auto& c, auto& a) {
                                 a.carry.state = c.lse;
                                 a.carry.last = false;
                               }}),
    [](const auto& info) { return std::string(info.param.label); });

class MlaPrefillBadChunk : public ::testing::TestWithParam<BadCall<ContextChunkArgs>> {};

TEST_P(MlaPrefillBadChunk, ThrowsAndWritesNothing) {
  for (const char* platform : {"cpu", "cuda:8.0"}) {
    PrefillCall call(options_for(platform, false));
    ContextChunkArgs args = call.context_chunk();
    GetParam().change(call, args);
    expect_refused<InvalidArgument>(
        call, [&] { call.impl->run_prefill_context_chunk(args); },
        [&](const InvalidArgument& e) {
          EXPECT_EQ(e.argument(), GetParam().argument) << e.what();
        });
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, MlaPrefillBadChunk,
    ::testing::Values(
        BadCall<ContextChunkArgs>{"no_plan", "plan", [](auto&, auto& a) { a.plan = nullptr; }},
        BadCall<ContextChunkArgs>{"plan_of_new_tokens", "plan",
                                  [](auto& c, auto&) { c.plan.request_causal[2] = 1; }},
        BadCall<ContextChunkArgs>{"plan_with_a_right_window", "plan",
                                  [](auto& c, auto&) { c.plan.window_right = 0; }},
        BadCall<ContextChunkArgs>{"no_lse", "lse", [](auto&, auto& a) { a.lse = {}; }},
        BadCall<ContextChunkArgs>{"no_out", "out", [](auto&, auto& a) { a.out = {}; }},
        BadCall<ContextChunkArgs>{"k_rows", "k",
                                  [](auto&, auto& a) { a.k.shape[0] = a.v.shape[0] = 306; }},
        BadCall<ContextChunkArgs>{"workspace_small", "workspace",
                                  [](auto&, auto& a) { a.workspace.size -= 1; }},
        BadCall<ContextChunkArgs>{"carry_and_out", "out",
                                  [](auto& c, auto& a) {
                                    a.carry.state = c.lse;
                                    a.carry.last = false;
                                  }},
        BadCall<ContextChunkArgs>{"carry_and_lse", "lse",
                                  [](auto& c, auto& a) {
                                    a.carry.state = c.lse;
                                    a.carry.last = false;
                                    a.out = {};
                                  }},
        BadCall<ContextChunkArgs>{"carry_ends", "carry",
                                  [](auto& c, auto& a) {
                                    a.carry.state = c.lse;
                                    a.out = a.lse = {};
                                  }}),
    [](const auto& info) { return std::string(info.param.label); });

TEST(MlaPrefillPaddedWorkspace, ThatOfThePlanAloneIsTooSmall) {
  const PrefillCall call(options_for("cuda:8.0", true));
  NewTokensArgs args = call.new_tokens();
  args.workspace.size = call.plan.workspace_bytes;
  expect_refused<InvalidArgument>(
      call, [&] { call.impl->run_prefill_new_tokens(args); },
      [](const InvalidArgument& e) {
        EXPECT_EQ(e.argument(), "workspace");
        EXPECT_EQ(e.op(), "FLASH_ATTN.run_prefill_new_tokens");
      });
}

void expect_unsupported(const PrefillCall& call, const NewTokensArgs& args, const char* reason) {
  expect_refused<Unsupported>(
      call, [&] { call.impl->run_prefill_new_tokens(args); },
      [&](const Unsupported& e) { EXPECT_THAT(e.reasons(), ElementsAre(HasSubstr(reason))); });
}

TEST(MlaPrefillQuantisedOutput, IsRefusedWithTheReasonOfTheBackend) {
  PrefillOptions o;
  o.quant_output = true;
  o.backend = "ROCM_AITER_FA";
  o.platform = "rocm:gfx942";
  const PrefillCall aiter(o);
  expect_unsupported(aiter, aiter.new_tokens(), "fused quantised output not supported");
  o.backend = "FLASH_ATTN";
  o.platform = "cuda:9.0";
  const PrefillCall cuda(o);
  expect_unsupported(cuda, cuda.new_tokens(),
                     "fused quantised output not supported: cuda:9.0 (must be cpu)");
}

TEST(MlaPrefillQuantisedOutput, IsRefusedWhereResultsMerge) {
  PrefillOptions o;
  o.quant_output = true;
  const PrefillCall call(o);
  NewTokensArgs args = call.new_tokens();
  args.lse = call.lse;
  expect_unsupported(call, args, "fused quantised output not supported with context");
  const HostTensor state(DType::f32, {341, 2, 130});
  args = call.new_tokens();
  args.carry.state = state;
  expect_unsupported(call, args, "fused quantised output not supported with context");
}

TEST(MlaPrefillQuantisedOutput, NeedsAScaleAndFp8) {
  PrefillOptions o;
  o.quant_output = true;
  const PrefillCall call(o);
  for (const float scale : {0.0F, -1.0F, std::numeric_limits<float>::quiet_NaN(),
                            std::numeric_limits<float>::infinity()}) {
    NewTokensArgs args = call.new_tokens();
    args.output_scale = scale;
    expect_refused<InvalidArgument>(
        call, [&] { call.impl->run_prefill_new_tokens(args); },
        [](const InvalidArgument& e) { EXPECT_EQ(e.argument(), "output_scale"); });
  }
  NewTokensArgs args = call.new_tokens();
  args.out.dtype = DType::fp8_e5m2;
  expect_refused<InvalidArgument>(
      call, [&] { call.impl->run_prefill_new_tokens(args); },
      [](const InvalidArgument& e) { EXPECT_EQ(e.argument(), "out"); });
}

}  // namespace
}  // namespace attend
