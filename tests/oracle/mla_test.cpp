// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/mla.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attend/core/float_types.h"
#include "oracle/mla_product.h"

namespace attend::oracle {
namespace {

double rounded(DType dtype, float x) {
  if (dtype == DType::f16) return to_f32(to_f16(x));
  return dtype == DType::bf16 ? to_f32(to_bf16(x)) : x;
}

/// Numbers of a dtype, and a problem made of them.
struct RandomRow {
  RandomRow(const MlaDims& dims, DType dtype, int num_keys, unsigned seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& v, int count, float scale) {
      for (int i = 0; i < count; ++i)
        v.push_back(static_cast<float>(rounded(dtype, scale * normal(rng))));
    };
    const float unit = 1 / std::sqrt(static_cast<float>(dims.kv_lora_rank));
    fill(q, dims.qk_head_dim(), 1);
    fill(latent, num_keys * dims.kv_lora_rank, 1);
    fill(k_pe, num_keys * dims.qk_rope_head_dim, 1);
    fill(w_uk, dims.qk_nope_head_dim * dims.kv_lora_rank, unit);
    fill(w_uv, dims.v_head_dim * dims.kv_lora_rank, unit);
    p.dims = dims;
    p.num_keys = num_keys;
    p.position = num_keys - 1;
    p.scale = 1.5 / std::sqrt(dims.qk_head_dim());
    p.dtype = p.cache_dtype = dtype;
    const auto at = [](const std::vector<float>& v, std::int64_t row, int columns, int i) {
      return static_cast<double>(v[static_cast<std::size_t>(row * columns + i)]);
    };
    const int rank = dims.kv_lora_rank;
    p.q = [this, at](int d) { return at(q, 0, 0, d); };
    p.latent = [this, at, rank](std::int64_t j, int l) { return at(latent, j, rank, l); };
    p.k_pe = [this, at](std::int64_t j, int d) { return at(k_pe, j, p.dims.qk_rope_head_dim, d); };
    p.w_uk = [this, at, rank](int i, int l) { return at(w_uk, i, rank, l); };
    p.w_uv = [this, at, rank](int v, int l) { return at(w_uv, v, rank, l); };
  }
  RandomRow(const RandomRow&) = delete;

  std::vector<float> q, latent, k_pe, w_uk, w_uv;
  MlaRowProblem p;
};

constexpr MlaDims kDeepSeek{512, 128, 64, 128};
constexpr MlaDims kSmall{256, 32, 64, 24};

/// A layer in float32, in the order of the loops.
struct FloatLayer {
  explicit FloatLayer(const MlaRowProblem& problem) : p(problem), n(problem.dims) {}

  float kept(float x) const { return static_cast<float>(rounded(p.dtype, x)); }
  float key(std::int64_t j, int i) const {
    float sum = 0;
    for (int l = 0; l < n.kv_lora_rank; ++l)
      sum += static_cast<float>(p.w_uk(i, l)) * static_cast<float>(p.latent(j, l));
    return sum;
  }
  float value(std::int64_t j, int v) const {
    float sum = 0;
    for (int l = 0; l < n.kv_lora_rank; ++l)
      sum += static_cast<float>(p.w_uv(v, l)) * static_cast<float>(p.latent(j, l));
    return sum;
  }
  float absorbed(int l) const {
    float sum = 0;
    for (int i = 0; i < n.qk_nope_head_dim; ++i)
      sum += static_cast<float>(p.w_uk(i, l)) * static_cast<float>(p.q(i));
    return sum;
  }
  template <typename Logit, typename Value>
  MlaExactRow attend(int columns, const Logit& logit, const Value& v) const {
    std::vector<float> weights;
    for (std::int64_t j = 0; j <= p.position; ++j)
      weights.push_back(logit(j) * static_cast<float>(p.scale));
    const float largest = *std::max_element(weights.begin(), weights.end());
    float sum = 0;
    for (float& w : weights) sum += w = std::exp(w - largest);
    MlaExactRow row;
    for (int d = 0; d < columns; ++d) {
      float out = 0;
      for (std::int64_t j = 0; j <= p.position; ++j)
        out += weights[static_cast<std::size_t>(j)] * v(j, d);
      row.out.push_back(kept(out / sum));
    }
    row.lse = largest + std::log(sum);
    return row;
  }
  float rotated(std::int64_t j) const {
    float sum = 0;
    for (int d = 0; d < n.qk_rope_head_dim; ++d)
      sum += static_cast<float>(p.q(n.qk_nope_head_dim + d)) * static_cast<float>(p.k_pe(j, d));
    return sum;
  }
  MlaExactRow prefill() const {
    const auto logit = [&](std::int64_t j) {
      float sum = rotated(j);
      for (int i = 0; i < n.qk_nope_head_dim; ++i)
        sum += static_cast<float>(p.q(i)) * kept(key(j, i));
      return sum;
    };
    return attend(n.v_head_dim, logit, [&](std::int64_t j, int d) { return kept(value(j, d)); });
  }
  MlaExactRow decode() const {
    std::vector<float> q;
    for (int l = 0; l < n.kv_lora_rank; ++l) q.push_back(kept(absorbed(l)));
    const auto latent = [&](std::int64_t j, int l) { return static_cast<float>(p.latent(j, l)); };
    const auto logit = [&](std::int64_t j) {
      float sum = rotated(j);
      for (int l = 0; l < n.kv_lora_rank; ++l) sum += q[static_cast<std::size_t>(l)] * latent(j, l);
      return sum;
    };
    const MlaExactRow latents = attend(n.kv_lora_rank, logit, latent);
    MlaExactRow row;
    row.lse = latents.lse;
    for (int v = 0; v < n.v_head_dim; ++v) {
      float sum = 0;
      for (int l = 0; l < n.kv_lora_rank; ++l)
        sum += static_cast<float>(p.w_uv(v, l)) *
               static_cast<float>(latents.out[static_cast<std::size_t>(l)]);
      row.out.push_back(kept(sum));
    }
    return row;
  }

  const MlaRowProblem& p;
  const MlaDims& n;
};

double largest_ratio(const MlaExactRow& got, const MlaRowResult& want) {
  double ratio = std::abs(got.lse - want.lse) / want.lse_bound;
  for (std::size_t d = 0; d < want.out.size(); ++d)
    ratio = std::max(ratio, std::abs(got.out[d] - want.out[d]) / want.out_bound[d]);
  return ratio;
}

TEST(MlaOracle, BothFormsAgree) {
  for (const MlaDims& dims : {kDeepSeek, kSmall}) {
    const RandomRow row(dims, DType::f32, 40, 1);
    const MlaExactRow a = mla_compute_friendly_row(row.p), b = mla_absorbed_row(row.p);
    ASSERT_EQ(a.out.size(), static_cast<std::size_t>(dims.v_head_dim));
    ASSERT_EQ(b.out.size(), a.out.size());
    EXPECT_NEAR(a.lse, b.lse, 1e-12 * std::abs(a.lse));
    for (std::size_t d = 0; d < a.out.size(); ++d)
      EXPECT_NEAR(a.out[d], b.out[d], 1e-12 * std::max(1.0, std::abs(a.out[d]))) << d;
  }
}

TEST(MlaOracle, TheCausalRowSeesKeysUpToItself) {
  RandomRow row(kSmall, DType::f32, 9, 2);
  row.p.position = 4;
  const MlaExactRow causal = mla_absorbed_row(row.p);
  row.p.num_keys = 5;
  EXPECT_EQ(mla_absorbed_row(row.p).out, causal.out);
  row.p.num_keys = 9;
  row.p.causal = false;
  EXPECT_NE(mla_absorbed_row(row.p).out, causal.out);
}

TEST(MlaOracle, FloatLayersAreWithinTheBounds) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const MlaDims& dims : {kDeepSeek, kSmall}) {
      SCOPED_TRACE(std::string(to_string(dtype)) + " " + std::to_string(dims.kv_lora_rank));
      RandomRow row(dims, dtype, 50, 3);
      // Without a scale all weights are equal: then what is rounded decides.
      for (const double scale : {row.p.scale, 0.0}) {
        row.p.scale = scale;
        const FloatLayer layer(row.p);
        EXPECT_LE(largest_ratio(layer.prefill(), mla_prefill_row(row.p)), 1.0) << scale;
        EXPECT_LE(largest_ratio(layer.decode(), mla_decode_row(row.p)), 1.0) << scale;
      }
    }
  }
}

TEST(MlaOracle, AForgottenKeyOrAnotherIsBeyondTheBounds) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    SCOPED_TRACE(to_string(dtype));
    RandomRow row(kDeepSeek, dtype, 10, 4);
    const MlaRowResult prefill = mla_prefill_row(row.p), decode = mla_decode_row(row.p);
    const auto expect_caught = [&](const MlaRowProblem& wrong) {
      EXPECT_GT(largest_ratio(FloatLayer(wrong).prefill(), prefill), 1.0);
      EXPECT_GT(largest_ratio(FloatLayer(wrong).decode(), decode), 1.0);
    };
    MlaRowProblem wrong = row.p;
    wrong.position -= 1;
    expect_caught(wrong);
    wrong = row.p;
    wrong.latent = [&](std::int64_t j, int l) { return row.p.latent(j == 7 ? 8 : j, l); };
    expect_caught(wrong);
    wrong = row.p;
    wrong.k_pe = [&](std::int64_t j, int d) { return row.p.k_pe(j == 7 ? 8 : j, d); };
    expect_caught(wrong);
    wrong = row.p;
    wrong.w_uv = [&](int v, int l) { return row.p.w_uv(v == 3 ? 4 : v, l); };
    expect_caught(wrong);
  }
}

TEST(MlaOracle, SparseRowsAttendToWhatIsNamed) {
  const RandomRow row(kDeepSeek, DType::bf16, 20, 6);
  std::vector<std::int32_t> all(25, -1);
  for (int j = 0; j < 20; ++j) all[static_cast<std::size_t>(j)] = j;
  const MlaRowResult dense = mla_decode_row(row.p), whole = mla_sparse_row(row.p, all);
  EXPECT_EQ(whole.out, dense.out);
  EXPECT_EQ(whole.lse_bound, dense.lse_bound);
  // One key, named twice, among names of nothing: its value, and a sum of two equal weights.
  const std::int32_t once[] = {7}, twice[] = {-1, 7, 20, 7, 1 << 30};
  const MlaRowResult one = mla_sparse_row(row.p, once), two = mla_sparse_row(row.p, twice);
  EXPECT_NEAR(two.lse, one.lse + std::log(2.0), 1e-12);
  for (std::size_t v = 0; v < one.out.size(); ++v) EXPECT_NEAR(two.out[v], one.out[v], 1e-12);
  MlaRowProblem earlier = row.p;
  earlier.position = 6;
  EXPECT_EQ(mla_sparse_row(earlier, twice).lse, -std::numeric_limits<double>::infinity());
}

TEST(MlaOracle, RoundsWhatALayerRounds) {
  const RandomRow row(kDeepSeek, DType::bf16, 50, 5);
  const MlaExactRow exact = mla_absorbed_row(row.p);
  const MlaRowResult prefill = mla_prefill_row(row.p), decode = mla_decode_row(row.p);
  EXPECT_GT(std::abs(exact.lse - prefill.lse), 1e-5);
  EXPECT_GT(std::abs(exact.lse - decode.lse), 1e-5);
  EXPECT_GT(std::abs(prefill.lse - decode.lse), 1e-5);
  EXPECT_NEAR(prefill.lse, exact.lse, 0.01);
  EXPECT_NEAR(decode.lse, exact.lse, 0.01);
}

TEST(MlaOracle, TheValueOfAnOnlyKeyIsRounded) {
  const RandomRow row(kDeepSeek, DType::bf16, 1, 8);
  for (const double x : mla_prefill_row(row.p).out)
    EXPECT_EQ(x, rounded(DType::bf16, static_cast<float>(x)));
}

TEST(MlaProduct, DoubtsCoverWhatAFloatChainRoundsTo) {
  constexpr int kTerms = 512, kColumns = 4000;
  std::mt19937 rng(9);
  std::normal_distribution<float> normal;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const auto draw = [&] { return rounded(dtype, normal(rng)); };
    std::vector<double> x;
    for (int i = 0; i < kTerms; ++i) x.push_back(draw());
    const Matrix w(kTerms, kColumns, [&](int, int) { return draw(); });
    const Rounded r = round_product(multiply(w, x), dtype);
    int doubtful = 0, other = 0;
    for (int c = 0; c < kColumns; ++c) {
      float chain = 0;
      for (int i = 0; i < kTerms; ++i)
        chain = std::fma(static_cast<float>(x[static_cast<std::size_t>(i)]),
                         static_cast<float>(w.at(i, c)), chain);
      const auto at = static_cast<std::size_t>(c);
      const double difference = std::abs(rounded(dtype, chain) - r.values[at]);
      ASSERT_LE(difference, r.doubts[at]) << to_string(dtype) << " " << c;
      other += difference > 0 ? 1 : 0;
      doubtful += r.doubts[at] > 0 ? 1 : 0;
    }
    EXPECT_GT(other, 0) << to_string(dtype);
    if (dtype == DType::bf16) {
      EXPECT_LT(doubtful, kColumns / 5);
    }
  }
}

TEST(MlaOracle, BoundsAreSmallerThanWhatTheyGuard) {
  const RandomRow row(kDeepSeek, DType::bf16, 400, 6);
  for (const bool prefill : {true, false}) {
    const MlaRowResult r = prefill ? mla_prefill_row(row.p) : mla_decode_row(row.p);
    double bound = 0, out = 0;
    for (std::size_t d = 0; d < r.out.size(); ++d) {
      bound += r.out_bound[d];
      out += std::abs(r.out[d]);
    }
    EXPECT_LT(bound, (prefill ? 0.12 : 0.25) * out);
    EXPECT_LT(r.lse_bound, 0.012);
  }
}

TEST(MlaOracle, ARowWithoutKeysIsZero) {
  for (const int num_keys : {0, 3}) {
    RandomRow row(kSmall, DType::bf16, 3, 7);
    row.p.num_keys = num_keys;
    row.p.position = -1;
    for (const MlaRowResult& r : {mla_prefill_row(row.p), mla_decode_row(row.p)}) {
      EXPECT_EQ(r.lse, -std::numeric_limits<double>::infinity());
      EXPECT_EQ(r.lse_bound, 0.0);
      EXPECT_THAT(r.out, ::testing::SizeIs(24));
      EXPECT_THAT(r.out, ::testing::Each(0.0));
      EXPECT_THAT(r.out_bound, ::testing::Each(0.0));
    }
    EXPECT_THAT(mla_absorbed_row(row.p).out, ::testing::Each(0.0));
    EXPECT_THAT(mla_compute_friendly_row(row.p).out, ::testing::Each(0.0));
  }
}

}  // namespace
}  // namespace attend::oracle
