// SPDX-License-Identifier: Apache-2.0
// Attention straight from fp8 keys and values: every code, the bits of a decoded cache, descales.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "attend/oracle/quantize.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Problem {
  HostTensor q, k, v, out, lse, query_start{DType::i32, {2}}, key_start{DType::i32, {2}};
  FlashAttnVarlenArgs args;

  Problem(DType kv, DType q_dtype, int queries, int keys, int q_heads, int kv_heads, int dim)
      : q(q_dtype, {queries, q_heads, dim}),
        k(kv, {keys, kv_heads, dim}),
        v(kv, {keys, kv_heads, dim}),
        out(is_fp8(q_dtype) ? DType::f32 : q_dtype, {queries, q_heads, dim}),
        lse(DType::f32, {queries, q_heads}) {
    query_start.as<std::int32_t>()[1] = queries;
    key_start.as<std::int32_t>()[1] = keys;
    args.q = q;
    args.k = k;
    args.v = v;
    args.out = out;
    args.lse = lse;
    args.query_start_loc = query_start;
    args.cu_seqlens_kv = key_start;
    args.params.causal = true;
  }
};

class Fp8Attention : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(Fp8Attention, EveryCodeIsDecodedExactly) {
  for (const DType t : {DType::fp8_e4m3, DType::fp8_e5m2}) {
    // One key: the output is its value. Head c / 8 and dimension c % 8 hold code c; 8 dimensions
    // are the shortest tail of a vector, and a second run has whole vectors.
    for (const int dim : {8, 64}) {
      const int heads = 256 / dim;
      Problem p(t, DType::f32, 1, 1, heads, heads, dim);
      for (int c = 0; c < 256; ++c) p.v.as<std::uint8_t>()[c] = static_cast<std::uint8_t>(c);
      flash_attn_varlen(p.args, nullptr, GetParam());
      for (int c = 0; c < 256; ++c) {
        const double expected = oracle::fp8_value(t, static_cast<std::uint8_t>(c)),
                     got = p.out.as<float>()[c];
        EXPECT_TRUE(std::isnan(expected) ? std::isnan(got) : got == expected)
            << to_string(t) << " code " << c << " dim " << dim << ": " << got;
      }
    }
  }
}

TEST_P(Fp8Attention, GivesTheBitsOfABf16CacheOfTheSameValues) {
  for (const DType t : {DType::fp8_e4m3, DType::fp8_e5m2}) {
    for (const int queries : {1, 3, 70}) {
      Rng rng(11);
      Problem fp8(t, DType::bf16, queries, 900, 8, 2, 72),
          wide(DType::bf16, DType::bf16, queries, 900, 8, 2, 72);
      fp8.q.fill_normal(rng);
      std::memcpy(wide.q.view().data, fp8.q.view().data, fp8.q.bytes());
      for (auto [codes, values] : {std::pair{&fp8.k, &wide.k}, {&fp8.v, &wide.v}}) {
        for (std::int64_t i = 0; i < codes->numel(); ++i) {
          int code = static_cast<int>(rng.next() % 256);
          if (!std::isfinite(oracle::fp8_value(t, static_cast<std::uint8_t>(code)))) code = 0;
          const auto at = static_cast<std::size_t>(i);
          codes->as<std::uint8_t>()[at] = static_cast<std::uint8_t>(code);
          values->as<bf16>()[at] =
              to_bf16(static_cast<float>(oracle::fp8_value(t, static_cast<std::uint8_t>(code))));
        }
      }
      fp8.args.params.scale = wide.args.params.scale = t == DType::fp8_e4m3 ? 1e-4F : 1e-8F;
      flash_attn_varlen(fp8.args, nullptr, GetParam());
      flash_attn_varlen(wide.args, nullptr, GetParam());
      EXPECT_EQ(fp8.out.snapshot(), wide.out.snapshot()) << to_string(t) << " " << queries;
      EXPECT_EQ(fp8.lse.snapshot(), wide.lse.snapshot()) << to_string(t) << " " << queries;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, Fp8Attention, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

struct Refused {
  const char* argument;
  std::function<void(FlashAttnVarlenArgs&)> spoil;
};
const float kGood[] = {1.0F, 2.0F};
const float kZero[] = {1.0F, 0.0F};
const float kNegative[] = {-1.0F, 1.0F};
const float kNan[] = {1.0F, NAN};
const float kInfinite[] = {kInf, 1.0F};

ConstTensorView scales(const float* data) { return {data, DType::f32, {1, 2}}; }

TEST(Fp8AttentionBadInput, IsRefusedBeforeAnythingIsWritten) {
  const std::vector<Refused> cases{
      {"k_descale", [](auto& a) { a.k_descale = scales(kZero); }},
      {"k_descale", [](auto& a) { a.k_descale = scales(kNan); }},
      {"v_descale", [](auto& a) { a.v_descale = scales(kNegative); }},
      {"v_descale", [](auto& a) { a.v_descale = scales(kInfinite); }},
      {"v_descale", [](auto& a) { a.v_descale = {kGood, DType::f32, {2}}; }},
      {"k_descale", [](auto& a) { a.k_descale = {kGood, DType::f32, {2, 1}}; }},
      {"k_descale", [](auto& a) { a.k_descale = {kGood, DType::bf16, {1, 2}}; }},
      {"q_descale", [](auto& a) { a.q_descale = scales(kGood); }},  // q is not fp8
      {"v", [](auto& a) { a.v.dtype = DType::fp8_e5m2; }},
      {"out", [](auto& a) { a.out.dtype = DType::f16; }},
  };
  for (const Refused& c : cases) {
    Problem p(DType::fp8_e4m3, DType::bf16, 2, 4, 2, 2, 16);
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

TEST(Fp8AttentionBadInput, DescalesNeedFp8) {
  Problem p(DType::bf16, DType::bf16, 2, 4, 2, 2, 16);
  p.args.k_descale = scales(kGood);
  EXPECT_THROW(flash_attn_varlen(p.args), InvalidArgument);
}

}  // namespace
}  // namespace attend::testing
