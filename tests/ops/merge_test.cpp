// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/merge.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "attend/oracle/attention.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Two random partial results and room for the merged one.
struct Problem {
  Problem(DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t dim, Rng& rng)
      : out(dtype, {tokens, heads, dim}),
        lse(DType::f32, {tokens, heads}),
        prefix_out(dtype, {tokens, heads, dim}),
        prefix_lse(DType::f32, {tokens, heads}),
        suffix_out(dtype, {tokens, heads, dim}),
        suffix_lse(DType::f32, {tokens, heads}) {
    prefix_out.fill_normal(rng);
    suffix_out.fill_normal(rng);
    prefix_lse.fill_normal(rng, 4.0F);
    suffix_lse.fill_normal(rng, 4.0F);
  }
  MergeAttnStatesArgs args() const {
    return {.out = out,
            .lse = lse,
            .prefix_out = prefix_out,
            .prefix_lse = prefix_lse,
            .suffix_out = suffix_out,
            .suffix_lse = suffix_lse};
  }
  HostTensor out, lse, prefix_out, prefix_lse, suffix_out, suffix_lse;
};

void fill(const TensorView& t, float value) {
  for (std::int64_t i = 0; i < t.numel(); ++i) {
    if (t.dtype == DType::f32) t.as<float>()[i] = value;
    if (t.dtype == DType::f16) t.as<f16>()[i] = to_f16(value);
    if (t.dtype == DType::bf16) t.as<bf16>()[i] = to_bf16(value);
  }
}

void expect_matches_oracle(const MergeAttnStatesArgs& a) {
  const oracle::Result want = oracle::merge_attn_states(a);
  merge_attn_states(a);
  std::size_t i = 0;
  std::size_t row = 0;
  for (std::int64_t t = 0; t < a.out.shape[0]; ++t) {
    for (std::int64_t h = 0; h < a.out.shape[1]; ++h, ++row) {
      if (a.lse.defined()) {
        const double lse = testing::get(a.lse, {t, h});
        if (std::isinf(want.lse[row])) {
          ASSERT_EQ(lse, want.lse[row]) << "token " << t << " head " << h;
        } else {
          ASSERT_NEAR(lse, want.lse[row], want.lse_bound[row]) << "token " << t << " head " << h;
        }
      }
      for (std::int64_t d = 0; d < a.out.shape[2]; ++d, ++i) {
        ASSERT_NEAR(testing::get(a.out, {t, h, d}), want.out[i], want.out_bound[i])
            << "token " << t << " head " << h << " dim " << d;
      }
    }
  }
}

class MergeTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Types, MergeTest, ::testing::Values(DType::f32, DType::f16, DType::bf16));

TEST_P(MergeTest, MatchesTheOracle) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  const std::vector<float> special = {kInf, -kInf, kNan, -kNan, 0.0F, 300.0F, -300.0F};
  for (int round = 0; round < 60; ++round) {
    Problem p(GetParam(), rng.integer(0, 5), rng.integer(1, 4), rng.integer(1, 33), rng);
    for (const HostTensor* lse : {&p.prefix_lse, &p.suffix_lse}) {
      for (float& x : lse->as<float>()) x = rng.chance(0.3) ? rng.pick(special) : x;
    }
    MergeAttnStatesArgs a = p.args();
    if (rng.chance(0.5)) {
      a.prefill_tokens_with_context = static_cast<int>(rng.integer(0, a.out.shape[0]));
    }
    if (rng.chance(0.2)) a.lse = {};
    expect_matches_oracle(a);
  }
}

TEST_P(MergeTest, AnEmptySideIsNeverReadAsANumber) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  for (const float empty : {kInf, -kInf, kNan}) {
    Problem p(GetParam(), 3, 2, 16, rng);
    fill(p.prefix_out, kNan);
    fill(p.prefix_lse, empty);
    merge_attn_states(p.args());
    EXPECT_EQ(p.out.snapshot(), p.suffix_out.snapshot()) << empty;
    EXPECT_EQ(p.lse.snapshot(), p.suffix_lse.snapshot()) << empty;

    MergeAttnStatesArgs swapped = p.args();
    std::swap(swapped.prefix_out, swapped.suffix_out);
    std::swap(swapped.prefix_lse, swapped.suffix_lse);
    merge_attn_states(swapped);
    EXPECT_EQ(p.out.snapshot(), p.suffix_out.snapshot()) << empty;
    EXPECT_EQ(p.lse.snapshot(), p.suffix_lse.snapshot()) << empty;
  }
}

TEST_P(MergeTest, BothEmptyGivesZeroAndMinusInfinity) {
  Rng rng(3);
  Problem p(GetParam(), 2, 2, 8, rng);
  fill(p.prefix_out, kNan);
  fill(p.suffix_out, kNan);
  fill(p.prefix_lse, kInf);
  fill(p.suffix_lse, kNan);
  p.out.fill_bytes(0xFF);
  merge_attn_states(p.args());
  for (const unsigned char byte : p.out.snapshot()) ASSERT_EQ(byte, 0);
  for (const float x : p.lse.as<float>()) ASSERT_EQ(x, -kInf);
}

TEST_P(MergeTest, TokensWithoutContextTakeTheSuffixAsItIs) {
  Rng rng(4);
  Problem p(GetParam(), 4, 2, 8, rng);
  fill(p.prefix_out, kNan);
  fill(p.prefix_lse, kNan);
  MergeAttnStatesArgs a = p.args();
  fill(TensorView(p.prefix_lse).slice(0, 2, 2), 50.0F);  // would dominate if it were read
  a.prefill_tokens_with_context = 2;
  merge_attn_states(a);
  EXPECT_EQ(p.out.snapshot(), p.suffix_out.snapshot());
  EXPECT_EQ(p.lse.snapshot(), p.suffix_lse.snapshot());
}

TEST_P(MergeTest, CommutesBitForBit) {
  Rng rng(5);
  SCOPED_TRACE(rng.trace());
  Problem p(GetParam(), 5, 3, 24, rng);
  merge_attn_states(p.args());
  const auto out = p.out.snapshot();
  const auto lse = p.lse.snapshot();
  MergeAttnStatesArgs a = p.args();
  std::swap(a.prefix_out, a.suffix_out);
  std::swap(a.prefix_lse, a.suffix_lse);
  merge_attn_states(a);
  EXPECT_EQ(p.out.snapshot(), out);
  EXPECT_EQ(p.lse.snapshot(), lse);
}

TEST_P(MergeTest, WorksInPlaceOnEitherSide) {
  Rng rng(6);
  SCOPED_TRACE(rng.trace());
  Problem p(GetParam(), 5, 3, 24, rng);
  merge_attn_states(p.args());
  const auto out = p.out.snapshot();
  const auto lse = p.lse.snapshot();
  for (const bool on_prefix : {true, false}) {
    Rng again(6);
    Problem q(GetParam(), 5, 3, 24, again);
    const HostTensor& side_out = on_prefix ? q.prefix_out : q.suffix_out;
    const HostTensor& side_lse = on_prefix ? q.prefix_lse : q.suffix_lse;
    MergeAttnStatesArgs a = q.args();
    a.out = side_out;
    a.lse = side_lse;
    merge_attn_states(a);
    EXPECT_EQ(side_out.snapshot(), out);
    EXPECT_EQ(side_lse.snapshot(), lse);
  }
}

TEST_P(MergeTest, ThreadsDoNotChangeTheBits) {
  Rng rng(7);
  SCOPED_TRACE(rng.trace());
  Problem p(GetParam(), 300, 5, 128, rng);  // large enough for the executor
  const auto one = make_thread_pool(1);
  merge_attn_states(p.args(), one.get());
  const auto out = p.out.snapshot();
  const auto lse = p.lse.snapshot();
  for (const int threads : {2, 3, 7}) {
    p.out.fill_bytes(0);
    p.lse.fill_bytes(0);
    const auto pool = make_thread_pool(threads);
    merge_attn_states(p.args(), pool.get());
    EXPECT_EQ(p.out.snapshot(), out) << threads;
    EXPECT_EQ(p.lse.snapshot(), lse) << threads;
  }
}

TEST_P(MergeTest, StridedTensors) {
  Rng rng(8);
  SCOPED_TRACE(rng.trace());
  Problem p(GetParam(), 6, 4, 16, rng);
  // Heads before tokens, and an LSE of [H, T] as the field stores it.
  MergeAttnStatesArgs a = p.args();
  const auto turned = [](const auto& view) {
    auto t = view;
    std::swap(t.shape[0], t.shape[1]);
    std::swap(t.strides[0], t.strides[1]);
    return t;
  };
  a.out = turned(a.out);
  a.prefix_out = turned(a.prefix_out);
  a.suffix_out = turned(a.suffix_out);
  a.prefix_lse = turned(a.prefix_lse);
  a.suffix_lse = turned(a.suffix_lse);
  a.lse = turned(a.lse);
  expect_matches_oracle(a);
  a.out = a.out.slice(2, 0, 8);
  a.prefix_out = a.prefix_out.slice(2, 8, 8);
  a.suffix_out = a.suffix_out.slice(2, 8, 8);
  expect_matches_oracle(a);
}

class MergeErrorTest : public ::testing::Test {
 protected:
  // Argument that the op blames after `change`; checks that nothing was written.
  std::string blamed(const std::function<void(MergeAttnStatesArgs&)>& change) {
    Rng rng(9);
    Problem p(DType::f16, 4, 2, 8, rng);
    p.out.fill_bytes(0x5A);
    p.lse.fill_bytes(0x5A);
    MergeAttnStatesArgs a = p.args();
    change(a);
    std::string argument = "nothing";
    try {
      merge_attn_states(a);
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "merge_attn_states");
      argument = e.argument();
    }
    if (argument == "nothing") return argument;
    for (const HostTensor* t : {&p.out, &p.lse}) {
      for (const unsigned char byte : t->snapshot()) {
        if (byte != 0x5A) return argument + ", but wrote";
      }
    }
    return argument;
  }
};

TEST_F(MergeErrorTest, ShapesTypesAndPointers) {
  EXPECT_EQ(blamed([](auto&) {}), "nothing");
  EXPECT_EQ(blamed([](auto& a) { a.out = a.out.select(0, 0); }), "out");
  EXPECT_EQ(blamed([](auto& a) { a.out.dtype = DType::i8; }), "out");
  EXPECT_EQ(blamed([](auto& a) { a.out.data = nullptr; }), "out");
  EXPECT_EQ(blamed([](auto& a) { a.prefix_out.dtype = DType::bf16; }), "prefix_out");
  EXPECT_EQ(blamed([](auto& a) { a.prefix_out.shape[0] = 3; }), "prefix_out");
  EXPECT_EQ(blamed([](auto& a) { a.suffix_out.shape[2] = 4; }), "suffix_out");
  EXPECT_EQ(blamed([](auto& a) { a.suffix_out.data = nullptr; }), "suffix_out");
  EXPECT_EQ(blamed([](auto& a) { a.prefix_lse.dtype = DType::i32; }), "prefix_lse");
  EXPECT_EQ(blamed([](auto& a) { a.prefix_lse = {}; }), "prefix_lse");
  EXPECT_EQ(blamed([](auto& a) { a.suffix_lse.shape[1] = 1; }), "suffix_lse");
  EXPECT_EQ(blamed([](auto& a) { a.lse.shape[0] = 3; }), "lse");
  EXPECT_EQ(blamed([](auto& a) {
              a.suffix_out.data = static_cast<const std::byte*>(a.suffix_out.data) + 1;
            }),
            "suffix_out");
  EXPECT_EQ(blamed([](auto& a) { a.suffix_out.device.type = DeviceType::rocm; }), "suffix_out");
}

TEST_F(MergeErrorTest, TokensWithContext) {
  EXPECT_EQ(blamed([](auto& a) { a.prefill_tokens_with_context = 4; }), "nothing");
  EXPECT_EQ(blamed([](auto& a) { a.prefill_tokens_with_context = 5; }),
            "prefill_tokens_with_context");
  EXPECT_EQ(blamed([](auto& a) { a.prefill_tokens_with_context = -2; }),
            "prefill_tokens_with_context");
}

TEST_F(MergeErrorTest, StridesAndOverlap) {
  EXPECT_EQ(blamed([](auto& a) { std::swap(a.suffix_out.strides[2], a.suffix_out.strides[1]); }),
            "suffix_out");
  EXPECT_EQ(blamed([](auto& a) { a.out.strides[0] = 0; }), "out");
  EXPECT_EQ(blamed([](auto& a) { a.lse.strides[1] = 0; }), "lse");
  // The same memory one token later: not element by element in place.
  EXPECT_EQ(blamed([](auto& a) {
              a.prefix_out = a.out;
              a.prefix_out.strides[0] = 0;
            }),
            "out");
  EXPECT_EQ(blamed([](auto& a) { a.prefix_lse = ConstTensorView(a.out.data, DType::f32, {4, 2}); }),
            "out");
  EXPECT_EQ(blamed([](auto& a) { a.lse = TensorView(a.out.data, DType::f32, {4, 2}); }), "lse");
  EXPECT_EQ(blamed([](auto& a) {
              a.lse.data = const_cast<void*>(a.suffix_lse.data);
              a.lse.strides[0] = 1;
              a.lse.strides[1] = 4;
            }),
            "lse");
}

}  // namespace
}  // namespace attend
