// SPDX-License-Identifier: Apache-2.0
// Attention over codes with a scale for each key and value. The values themselves are compared with
// the oracle by the conformance cases.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

constexpr int kHeads = 2, kDim = 24;

/// A causal prefill of one request over ragged keys.
struct Problem {
  HostTensor q, k, v, out, k_scale, v_scale, query_start{DType::i32, {2}};
  FlashAttnVarlenArgs args;

  Problem(DType codes, int keys)
      : q(DType::f32, {keys, kHeads, kDim}),
        k(codes, {keys, kHeads, kDim}),
        v(codes, {keys, kHeads, kDim}),
        out(DType::f32, {keys, kHeads, kDim}),
        k_scale(DType::f32, {keys, kHeads}),
        v_scale(DType::f32, {keys, kHeads}) {
    Rng rng(17);
    q.fill_normal(rng);
    for (HostTensor* t : {&k, &v})
      for (auto& code : t->as<std::uint8_t>()) code = static_cast<std::uint8_t>(rng.next() % 64);
    k_scale.fill_uniform(rng, 0.005F, 0.02F);
    v_scale.fill_uniform(rng, 0.005F, 0.02F);
    query_start.as<std::int32_t>()[1] = keys;
    args.q = q;
    args.k = k;
    args.v = v;
    args.k_token_scale = k_scale;
    args.v_token_scale = v_scale;
    args.out = out;
    args.query_start_loc = args.cu_seqlens_kv = query_start;
    args.params.causal = true;
  }
};

class TokenScales : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(TokenScales, ANanReachesTheRowsThatSeeItsKeyAndNoOthers) {
  for (const bool of_key : {true, false}) {
    Problem p(DType::i8, 300);
    flash_attn_varlen(p.args, nullptr, GetParam());
    const std::vector<float> clean(p.out.as<float>().begin(), p.out.as<float>().end());
    constexpr int kBadKey = 261, kBadHead = 1;
    (of_key ? p.k_scale : p.v_scale).as<float>()[kBadKey * kHeads + kBadHead] = NAN;
    flash_attn_varlen(p.args, nullptr, GetParam());
    for (std::size_t i = 0; i < clean.size(); ++i) {
      const auto token = static_cast<int>(i) / (kHeads * kDim);
      const auto head = static_cast<int>(i) / kDim % kHeads;
      if (token >= kBadKey && head == kBadHead) {
        EXPECT_TRUE(std::isnan(p.out.as<float>()[i])) << of_key << " " << token;
      } else {
        EXPECT_EQ(std::memcmp(&clean[i], &p.out.as<float>()[i], sizeof(float)), 0)
            << of_key << " " << token << " " << head;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, TokenScales, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST(TokenScalesBadInput, IsRefusedBeforeAnythingIsWritten) {
  struct Refused {
    DType codes;
    const char* argument;
    std::function<void(FlashAttnVarlenArgs&)> spoil;
  };
  const std::vector<Refused> cases{
      {DType::i8, "k_token_scale", [](auto& a) { a.k_token_scale = {}; }},
      {DType::i8, "v_token_scale", [](auto& a) { a.v_token_scale = {}; }},
      {DType::i8, "k_token_scale",
       [](auto& a) { a.k_token_scale = a.k_token_scale.slice(0, 0, 3); }},
      {DType::i8, "v_token_scale", [](auto& a) { a.v_token_scale.dtype = DType::i32; }},
      {DType::i8, "k_token_scale", [](auto& a) { a.k_token_scale = a.k_token_scale.select(1, 0); }},
      {DType::fp8_e4m3, "v_token_scale", [](auto& a) { a.v_token_scale = {}; }},
      {DType::fp8_e4m3, "v_token_scale", [](auto& a) { a.k_token_scale = {}; }},
      {DType::i8, "q", [](auto& a) { a.q.dtype = DType::i8; }},
      {DType::i8, "v", [](auto& a) { a.v.dtype = DType::fp8_e5m2; }},
      {DType::i8, "k_descale", [](auto& a) { a.k_descale = a.k_token_scale.slice(0, 0, 1); }},
      {DType::i8, "out", [](auto& a) { a.out.data = const_cast<void*>(a.k_token_scale.data); }},
  };
  for (const Refused& c : cases) {
    Problem p(c.codes, 4);
    p.out.fill_bytes(0x5a);
    const auto before = p.out.snapshot();
    c.spoil(p.args);
    try {
      flash_attn_varlen(p.args);
      ADD_FAILURE() << c.argument << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), c.argument) << e.what();
    }
    EXPECT_EQ(p.out.snapshot(), before);
  }
}

TEST(TokenScalesBadInput, OnlyCodesHaveThem) {
  Problem p(DType::fp8_e4m3, 4);
  HostTensor k(DType::f32, {4, kHeads, kDim});
  p.args.k = p.args.v = k;
  try {
    flash_attn_varlen(p.args);
    ADD_FAILURE() << "accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "k_token_scale") << e.what();
  }
}

}  // namespace
}  // namespace attend::testing
