// SPDX-License-Identifier: Apache-2.0
// The largest heads that ops take: 576 and 512 elements, 256 of int8 queries.
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "attend/ops/int8_attention.h"
#include "conformance/int8_problem.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

/// One request, causal, two query heads to a kv head.
struct Call {
  Call(DType dtype, int dim, int dim_v)
      : dim(dim),
        dim_v(dim_v),
        q(dtype, {kQueries, 4, dim}),
        k(dtype, {kKeys, 2, dim}),
        v(dtype, {kKeys, 2, dim_v}),
        out(dtype, {kQueries, 4, dim_v}),
        lse(DType::f32, {kQueries, 4}) {
    Rng rng(3);
    for (HostTensor* t : {&q, &k, &v}) t->fill_normal(rng);
    query_start.as<std::int32_t>()[1] = kQueries;
    key_start.as<std::int32_t>()[1] = kKeys;
  }
  FlashAttnVarlenArgs args() const {
    FlashAttnVarlenArgs a;
    a.q = q;
    a.k = k;
    a.v = v;
    a.out = out;
    a.lse = lse;
    a.query_start_loc = query_start;
    a.cu_seqlens_kv = key_start;
    a.params.causal = true;
    return a;
  }

  static constexpr int kQueries = 5, kKeys = 300;
  int dim, dim_v;
  HostTensor q, k, v, out, lse, query_start{DType::i32, {2}}, key_start{DType::i32, {2}};
};

/// Row of a query in float64: its value in column `column`, and its LSE.
std::pair<double, double> reference(const Call& c, int query, int head, int column) {
  double sum = 0.0, value = 0.0;
  for (int j = 0; j <= Call::kKeys - Call::kQueries + query; ++j) {
    double logit = 0.0;
    for (int e = 0; e < c.dim; ++e)
      logit += get(c.q, {query, head, e}) * get(c.k, {j, head / 2, e});
    const double weight = std::exp(logit / std::sqrt(static_cast<double>(c.dim)));
    sum += weight;
    value += weight * get(c.v, {j, head / 2, column});
  }
  return {value / sum, std::log(sum)};
}

class LargestHeads : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(LargestHeads, AreThoseOfLatentAttention) {
  for (const auto& [dtype, tolerance] :
       {std::pair{DType::f32, 2e-5}, {DType::f16, 2e-3}, {DType::bf16, 2e-2}}) {
    for (const auto& [dim, dim_v] : {std::pair{576, 512}, {576, 8}, {8, 512}, {264, 264}}) {
      SCOPED_TRACE(std::string(to_string(dtype)) + " " + std::to_string(dim));
      Call c(dtype, dim, dim_v);
      flash_attn_varlen(c.args(), nullptr, GetParam());
      for (const int query : {0, 4}) {
        for (int head = 0; head < 4; ++head) {
          const auto [value, lse] = reference(c, query, head, dim_v - 1);
          EXPECT_NEAR(get(c.out, {query, head, dim_v - 1}), value, tolerance);
          EXPECT_NEAR(get(c.lse, {query, head}), lse, tolerance);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, LargestHeads, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

template <typename Op>
std::string refusal(Op&& op) {
  try {
    op();
  } catch (const InvalidArgument& e) {
    return e.argument();
  }
  return "accepted";
}

TEST(LargerHeads, AreRefused) {
  const auto refused = [](int dim, int dim_v) {
    const Call c(DType::bf16, dim, dim_v);
    return refusal([&] { flash_attn_varlen(c.args()); });
  };
  EXPECT_EQ(refused(576, 512), "accepted");
  EXPECT_EQ(refused(584, 512), "q");
  EXPECT_EQ(refused(576, 520), "v");
}

TEST(LargerHeads, OfInt8AreThoseAbove256) {
  const auto refused = [](int dim, int dim_v, DType values) {
    conformance::Rng rng(5);
    conformance::AttentionShape shape;
    shape.kv_heads = 2;
    shape.group_size = 2;
    shape.head_dim = dim;
    shape.head_dim_v = dim_v;
    shape.query_lens = {3};
    shape.seq_lens = {20};
    shape.causal = true;
    conformance::Int8Options options;
    options.values = values;
    conformance::Int8Problem problem(rng, shape, options);
    problem.reset();
    return refusal([&] { flash_attn_varlen_int8(problem.args()); });
  };
  for (const DType values : {DType::i8, DType::bf16}) {
    EXPECT_EQ(refused(256, 256, values), "accepted");
    EXPECT_EQ(refused(264, 256, values), "q");
    EXPECT_EQ(refused(256, 264, values), "v");
  }
}

}  // namespace
}  // namespace attend::testing
