// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/differential.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "support/random.h"

namespace attend::oracle {
namespace {

constexpr std::int64_t kDim = 8;

using Floats = std::vector<float>;

ConstTensorView ints(const std::vector<std::int32_t>& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}

/// Head `h` of [N, heads, kDim].
std::span<const float> head_of(const Floats& t, std::int64_t row, std::int64_t heads,
                               std::int64_t h) {
  return std::span(t).subspan(static_cast<std::size_t>((row * heads + h) * kDim),
                              static_cast<std::size_t>(kDim));
}

/// One request of random numbers, causal.
struct Problem {
  Problem(std::int64_t tokens, std::int64_t keys, std::int64_t q_heads, std::int64_t kv_heads)
      : q_heads(q_heads),
        kv_heads(kv_heads),
        q_start{0, static_cast<std::int32_t>(tokens)},
        k_start{0, static_cast<std::int32_t>(keys)} {
    testing::Rng rng(11);
    for (auto [t, n] :
         {std::pair{&q, tokens * q_heads}, {&k, keys * kv_heads}, {&v, keys * kv_heads}}) {
      t->resize(static_cast<std::size_t>(n * kDim));
      rng.fill_normal(std::span(*t));
    }
  }
  DifferentialAttentionArgs args(DifferentialVariant variant, HeadPairing pairing) const {
    DifferentialAttentionArgs a;
    a.q = {q.data(), DType::f32, {q_start[1], q_heads, kDim}};
    a.k = {k.data(), DType::f32, {k_start[1], kv_heads, kDim}};
    a.v = {v.data(), DType::f32, {k_start[1], kv_heads, kDim}};
    a.out.dtype = DType::f32;
    a.query_start_loc = ints(q_start);
    a.cu_seqlens_kv = ints(k_start);
    a.variant = variant;
    a.pairing = pairing;
    a.params.causal = true;
    return a;
  }
  /// Softmax of a query head over the keys of a kv head, times the values of another.
  std::vector<double> map(std::int64_t token, std::int64_t q_head, std::int64_t k_head,
                          std::int64_t v_head) const {
    std::vector<double> sum(static_cast<std::size_t>(kDim), 0.0);
    double total = 0.0;
    for (std::int64_t j = 0; j <= k_start[1] - q_start[1] + token; ++j) {
      double dot = 0.0;
      for (std::size_t d = 0; d < kDim; ++d)
        dot += double{head_of(q, token, q_heads, q_head)[d]} * head_of(k, j, kv_heads, k_head)[d];
      const double weight = std::exp(dot / std::sqrt(static_cast<double>(kDim)));
      total += weight;
      for (std::size_t d = 0; d < kDim; ++d) sum[d] += weight * head_of(v, j, kv_heads, v_head)[d];
    }
    for (double& x : sum) x /= total;
    return sum;
  }

  std::int64_t q_heads, kv_heads;
  std::vector<std::int32_t> q_start, k_start;
  Floats q, k, v;
};

TEST(OracleDifferential, IsTheDefinitionWrittenDown) {
  const Problem p(3, 5, 8, 4);
  std::vector<float> weight(2 * kDim);
  for (std::size_t d = 0; d < weight.size(); ++d) weight[d] = 0.5F + static_cast<float>(d);
  for (const HeadPairing pairing : {HeadPairing::interleaved, HeadPairing::halves}) {
    DifferentialAttentionArgs a = p.args(DifferentialVariant::v1, pairing);
    a.combine.lambda = 0.3F;
    a.combine.norm_weight = {weight.data(), DType::f32, {2 * kDim}};
    a.combine.norm_eps = 0.01F;
    a.combine.out_scale = 0.7F;
    const Result r = oracle::differential_attention(a);
    ASSERT_EQ(r.out.size(), static_cast<std::size_t>(3 * 8 * kDim));
    const bool adjacent = pairing == HeadPairing::interleaved;
    for (std::int64_t t = 0; t < 3; ++t) {
      for (std::int64_t pair = 0; pair < 4; ++pair) {
        // Two query pairs to a pair of kv heads.
        const std::int64_t q1 = adjacent ? 2 * pair : pair, q2 = adjacent ? q1 + 1 : pair + 4;
        const std::int64_t k1 = adjacent ? pair / 2 * 2 : pair / 2, k2 = adjacent ? k1 + 1 : k1 + 2;
        std::vector<double> x;
        double squares = 0.0;
        for (const std::int64_t v : {k1, k2}) {
          const auto first = p.map(t, q1, k1, v), second = p.map(t, q2, k2, v);
          for (std::size_t d = 0; d < kDim; ++d) {
            x.push_back(first[d] - double{0.3F} * second[d]);
            squares += x.back() * x.back();
          }
        }
        const double norm = std::sqrt(squares / 16.0 + double{0.01F});
        for (std::size_t d = 0; d < 16; ++d) {
          const auto at = static_cast<std::size_t>((t * 4 + pair) * 2 * kDim) + d;
          const double expected = x[d] / norm * weight[d] * double{0.7F};
          EXPECT_NEAR(r.out[at], expected, 1e-13 * (1.0 + std::abs(expected)));
          EXPECT_GT(r.out_bound[at], 0.0);
          EXPECT_LT(r.out_bound[at], 3e-4 * weight[d]);
        }
      }
    }
  }
}

TEST(OracleDifferential, ByHand) {
  // Equal keys: every map is the mean of the visible values. Values 1 and 3 in the pair's first
  // half, 10 and 30 in the second.
  Problem p(2, 2, 2, 2);
  std::fill(p.k.begin(), p.k.end(), 0.0F);
  for (std::size_t d = 0; d < kDim; ++d) {
    p.v[d] = 1.0F;
    p.v[kDim + d] = 10.0F;
    p.v[2 * kDim + d] = 3.0F;
    p.v[3 * kDim + d] = 30.0F;
  }
  DifferentialAttentionArgs a = p.args(DifferentialVariant::v1, HeadPairing::interleaved);
  a.combine.lambda = 0.25F;
  a.combine.norm = false;
  a.combine.out_scale = 2.0F;
  Result r = oracle::differential_attention(a);
  EXPECT_DOUBLE_EQ(r.out[0], 1.5 * 1.0);
  EXPECT_DOUBLE_EQ(r.out[kDim], 1.5 * 10.0);
  EXPECT_DOUBLE_EQ(r.out[2 * kDim], 1.5 * 2.0);
  EXPECT_DOUBLE_EQ(r.out[3 * kDim], 1.5 * 20.0);
  EXPECT_DOUBLE_EQ(r.lse[0], 0.0);
  EXPECT_DOUBLE_EQ(r.lse[3], std::log(2.0));
  // Mean square of the first row: 0.75^2 (1 + 100) / 2.
  a.combine.norm = true;
  a.combine.out_scale = 1.0F;
  r = oracle::differential_attention(a);
  EXPECT_NEAR(r.out[0], 0.75 / std::sqrt(0.5625 * 50.5 + 1e-5), 1e-12);
}

TEST(OracleDifferential, MapsAreThoseOfAttentionWithPairedValues) {
  const Problem p(4, 9, 4, 2);
  DifferentialAttentionArgs a = p.args(DifferentialVariant::v1, HeadPairing::interleaved);
  Floats maps(4 * 4 * 2 * kDim);
  a.maps = {maps.data(), DType::f32, {4, 4, 2 * kDim}};
  a.out = {};
  a.params.softcap = 2.0F;
  a.params.window_left = 3;
  const Result got = oracle::differential_attention(a);
  // [v1 | v2] of ragged keys is their memory read as one head; each branch is a call of its own.
  for (std::int64_t branch = 0; branch < 2; ++branch) {
    FlashAttnVarlenArgs f;
    f.q = a.q;
    f.q.data = p.q.data() + branch * kDim;
    f.q.shape[1] = 2;
    f.q.strides[1] = 2 * kDim;
    f.k = a.k.slice(1, branch, 1);
    f.v = {p.v.data(), DType::f32, {9, 1, 2 * kDim}};
    f.out.dtype = DType::f32;
    f.query_start_loc = a.query_start_loc;
    f.cu_seqlens_kv = a.cu_seqlens_kv;
    f.params = a.params;
    const Result wanted = oracle::flash_attn_varlen(f);
    for (std::size_t t = 0; t < 4; ++t) {
      for (std::size_t pair = 0; pair < 2; ++pair) {
        const std::size_t at = t * 4 + 2 * pair + static_cast<std::size_t>(branch);
        EXPECT_EQ(got.lse[at], wanted.lse[t * 2 + pair]);
        for (std::size_t d = 0; d < 2 * kDim; ++d) {
          EXPECT_EQ(got.out[at * 2 * kDim + d], wanted.out[(t * 2 + pair) * 2 * kDim + d]);
          EXPECT_EQ(got.out_bound[at * 2 * kDim + d],
                    wanted.out_bound[(t * 2 + pair) * 2 * kDim + d]);
        }
      }
    }
  }
}

TEST(OracleDifferential, Variant2TakesTheSigmoidOfEachTokenAndPair) {
  const Problem p(2, 6, 8, 2);
  DifferentialAttentionArgs a = p.args(DifferentialVariant::v2, HeadPairing::interleaved);
  const Floats lambda{-1.0F, 0.0F, 2.0F, 50.0F, 0.5F, -90.0F, 1.0F, 3.0F};
  a.combine.norm = false;
  a.combine.token_lambda = {lambda.data(), DType::f32, {2, 4}};
  const Result r = oracle::differential_attention(a);
  ASSERT_EQ(r.out.size(), static_cast<std::size_t>(2 * 4 * kDim));
  for (std::int64_t t = 0; t < 2; ++t) {
    for (std::int64_t pair = 0; pair < 4; ++pair) {
      const auto first = p.map(t, 2 * pair, pair / 2, pair / 2);
      const auto second = p.map(t, 2 * pair + 1, pair / 2, pair / 2);
      const double z = lambda[static_cast<std::size_t>(t * 4 + pair)];
      for (std::size_t d = 0; d < kDim; ++d)
        EXPECT_NEAR(r.out[static_cast<std::size_t>((t * 4 + pair) * kDim) + d],
                    first[d] - second[d] / (1.0 + std::exp(-z)), 1e-13);
    }
  }
}

TEST(OracleDifferential, ReadsBothBranchesThroughTheBlockTable) {
  const Problem p(1, 3, 2, 2);
  const DifferentialAttentionArgs ragged =
      p.args(DifferentialVariant::v1, HeadPairing::interleaved);
  // [2 branches, 3 blocks, 2 tokens, 1 head, 8]; keys 0 and 1 in block 2, key 2 in block 0.
  const auto paged = [](const Floats& rows) {
    Floats cache(2 * 3 * 2 * kDim, std::nanf(""));
    for (std::size_t j = 0; j < 3; ++j) {
      for (std::size_t branch = 0; branch < 2; ++branch) {
        const std::size_t block = j < 2 ? 2 : 0;
        for (std::size_t d = 0; d < kDim; ++d)
          cache[((branch * 3 + block) * 2 + j % 2) * kDim + d] = rows[(j * 2 + branch) * kDim + d];
      }
    }
    return cache;
  };
  const Floats k = paged(p.k), v = paged(p.v);
  const std::vector<std::int32_t> table{2, 0, -7}, lens{3};
  DifferentialAttentionArgs a = ragged;
  a.cu_seqlens_kv = {};
  a.seq_lens = ints(lens);
  a.block_table = {table.data(), DType::i32, {1, 3}};
  a.k = {k.data(), DType::f32, {2, 3, 2, 1, kDim}};
  a.v = {v.data(), DType::f32, {2, 3, 2, 1, kDim}};
  const Result wanted = oracle::differential_attention(ragged);
  const Result got = oracle::differential_attention(a);
  EXPECT_EQ(got.out, wanted.out);
  EXPECT_EQ(got.lse, wanted.lse);
  // A row alone has the same numbers.
  RowProblem rows[2];
  for (std::int64_t b = 0; b < 2; ++b) {
    rows[b].head_dim_qk = kDim;
    rows[b].head_dim_v = 2 * kDim;
    rows[b].position = 2;
    rows[b].num_keys = 3;
    rows[b].scale = 1.0 / std::sqrt(static_cast<double>(kDim));
    rows[b].q = [&p, b](int d) { return head_of(p.q, 0, 2, b)[static_cast<std::size_t>(d)]; };
    rows[b].k = [&p, b](std::int64_t j, int d) {
      return head_of(p.k, j, 2, b)[static_cast<std::size_t>(d)];
    };
    rows[b].v = [&p](std::int64_t j, int d) {
      return p.v[static_cast<std::size_t>(j * 2 * kDim + d)];
    };
  }
  DifferentialRowCombine combine;
  combine.norm_eps = ragged.combine.norm_eps;
  const DifferentialRow row = differential_row(rows[0], rows[1], combine, DType::f32);
  EXPECT_EQ(row.out, wanted.out);
  EXPECT_EQ(row.out_bound, wanted.out_bound);
  EXPECT_EQ(row.lse[1], wanted.lse[1]);
  EXPECT_EQ(row.lse_bound[1], wanted.lse_bound[1]);
}

TEST(OracleDifferential, ARowWithoutKeysIsExactlyZero) {
  const Problem p(3, 1, 2, 2);
  const Result r =
      oracle::differential_attention(p.args(DifferentialVariant::v1, HeadPairing::halves));
  for (std::size_t i = 0; i < 2 * 2 * kDim; ++i) {
    EXPECT_EQ(r.out[i], 0.0);
    EXPECT_EQ(r.out_bound[i], 0.0);
  }
  EXPECT_EQ(r.lse[0], -std::numeric_limits<double>::infinity());
  EXPECT_NE(r.out[2 * 2 * kDim], 0.0);
}

/// float32, one operation after the other, as a kernel may do it.
float float_combine(std::span<const float> a, std::span<const float> b, std::size_t d, float lambda,
                    float eps) {
  float squares = 0.0F;
  const auto x = [&](std::size_t i) { return a[i] - lambda * b[i]; };
  for (std::size_t i = 0; i < a.size(); ++i) squares += x(i) * x(i);
  return x(d) / std::sqrt(squares / static_cast<float>(a.size()) + eps);
}

TEST(OracleDifferential, BoundsHoldForMapsThatCancel) {
  // Maps that float32 has only roughly, so that what is left after the difference is mostly error,
  // and a norm that magnifies it: the bound must cover any maps within their own bounds.
  testing::Rng rng(4);
  for (const double apart : {0.0, 1e-7, 1e-5, 1e-3, 1.0}) {
    for (const float eps : {1e-12F, 1e-5F}) {
      RowProblem rows[2];
      std::vector<double> keys(20 * 8), values(20 * 16), query(8), shift(8);
      for (auto* t : {&keys, &values, &query, &shift})
        for (double& x : *t) x = rng.normal();
      for (int b = 0; b < 2; ++b) {
        rows[b].head_dim_qk = 8;
        rows[b].head_dim_v = 16;
        rows[b].position = 19;
        rows[b].num_keys = 20;
        rows[b].q = [&, b](int d) {
          const auto i = static_cast<std::size_t>(d);
          return query[i] + (b == 1 ? apart * shift[i] : 0.0);
        };
        rows[b].k = [&](std::int64_t j, int d) {
          return keys[static_cast<std::size_t>(j * 8 + d)];
        };
        rows[b].v = [&](std::int64_t j, int d) {
          return values[static_cast<std::size_t>(j * 16 + d)];
        };
      }
      DifferentialRowCombine combine;
      combine.lambda = 1.0;
      combine.norm_eps = eps;
      const DifferentialRow r = differential_row(rows[0], rows[1], combine, DType::f32);
      RowResult maps[2] = {attention_row(rows[0]), attention_row(rows[1])};
      double worst = 0.0;
      for (int trial = 0; trial < 50; ++trial) {
        Floats f[2];
        for (int b = 0; b < 2; ++b) {
          for (int d = 0; d < 16; ++d) {
            // As far off as a kernel may be, this way or that.
            const double bound = out_error_bound(maps[b], d, 8, DType::f32);
            const double sign = trial == 0 ? 1.0 - 2.0 * b : rng.chance(0.5) ? 1.0 : -1.0;
            f[b].push_back(
                static_cast<float>(maps[b].out[static_cast<std::size_t>(d)] + 0.9 * sign * bound));
          }
        }
        for (std::size_t d = 0; d < 16; ++d) {
          const double error = std::abs(float_combine(f[0], f[1], d, 1.0F, eps) - r.out[d]);
          EXPECT_LE(error, r.out_bound[d]) << apart << " " << eps;
          worst = std::max(worst, error / r.out_bound[d]);
        }
      }
      EXPECT_GT(worst, 0.01) << apart << " " << eps;  // the bound is of the error's size
    }
  }
}

TEST(OracleDifferential, CombinesStoredMaps) {
  testing::Rng rng(8);
  Floats maps(2 * 4 * 16);
  rng.fill_normal(std::span(maps));
  DifferentialCombineArgs a;
  a.maps = {maps.data(), DType::f32, {2, 4, 16}};
  a.out.dtype = DType::bf16;
  a.pairing = HeadPairing::halves;
  a.combine.lambda = 0.5F;
  a.combine.norm = false;
  const Result r = oracle::differential_combine(a);
  for (std::size_t t = 0; t < 2; ++t) {
    for (std::size_t pair = 0; pair < 2; ++pair) {
      for (std::size_t d = 0; d < 16; ++d) {
        const double x =
            double{maps[(t * 4 + pair) * 16 + d]} - 0.5 * double{maps[(t * 4 + pair + 2) * 16 + d]};
        const std::size_t at = (t * 2 + pair) * 16 + d;
        EXPECT_DOUBLE_EQ(r.out[at], x);
        // Half an ulp of bf16 and little more.
        EXPECT_GE(r.out_bound[at], 0x1p-9 * std::abs(x));
        EXPECT_LE(r.out_bound[at], 0x1.01p-8 * std::abs(x) + 1e-6);
      }
    }
  }
}

}  // namespace
}  // namespace attend::oracle
