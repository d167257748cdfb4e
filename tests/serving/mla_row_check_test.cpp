// SPDX-License-Identifier: Apache-2.0
#include "serving/mla_row_check.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "serving/mla_layer.h"

namespace attend::serving {
namespace {

using Row = std::vector<double>;

constexpr MlaDims kDims{512, 16, 64, 8};
constexpr int kKeys = 9, kPosition = 7;

/// Nearest number with `bits` significand bits, ties to even.
double with_bits(double x, int bits) {
  if (x == 0.0) return x;
  const double ulp = std::ldexp(1.0, std::ilogb(x) - bits + 1);
  return std::nearbyint(x / ulp) * ulp;
}

/// What a code of E4M3 stands for, for the code nearest to x.
double e4m3(double x) {
  if (x == 0.0) return x;
  const double ulp = std::ldexp(1.0, std::max(std::ilogb(x), -6) - 3);
  return std::clamp(std::nearbyint(x / ulp) * ulp, -448.0, 448.0);
}

/// A row of a layer that is computed here by hand, in double. In float32 a layer rounds nothing
/// that shows, so both paths are the same function of what the cache holds.
class MlaCheckRows : public ::testing::Test {
 protected:
  MlaCheckRows() {
    model_.num_q_heads = 4;
    model_.num_kv_heads = 1;
    model_.mla = kDims;
    model_.head_dim = kDims.cache_dim();
    model_.scale = 0.2F;
    request_.id = 3;
    request_.prompt_tokens = 10;
    request_.segments = {{5, 4}};
  }

  Row values(std::uint64_t content, std::int64_t p, int head, ValueKind kind, int count) const {
    std::vector<float> v(static_cast<std::size_t>(count));
    generator_.fill_f32({content, p, 1, head, kind}, count, v.data());
    return Row(v.begin(), v.end());
  }

  /// Latent and rotated key as the cache gives them back.
  static void store(const KvStorage& storage, Row& latent, Row& rotated) {
    if (storage.format == KvFormat::fp8_ds_mla) {
      for (std::size_t tile = 0; tile < latent.size(); tile += 128) {
        float amax = 0;
        for (std::size_t l = tile; l < tile + 128; ++l)
          amax = std::max(amax, static_cast<float>(std::abs(latent[l])));
        const float scale = amax / 448;
        for (std::size_t l = tile; l < tile + 128; ++l) {
          const auto quotient = static_cast<float>(latent[l]) / scale;
          latent[l] = with_bits(static_cast<float>(e4m3(quotient)) * scale, 8);
        }
      }
    } else if (storage.dtype == DType::fp8_e4m3) {
      for (Row* row : {&latent, &rotated})
        for (double& x : *row) x = e4m3(x);
    }
  }

  SampledRow row_of(const KvStorage& storage) const {
    const int head = 3;
    const Row q =
        values(own_content_id(request_), kPosition, head, ValueKind::query, kDims.qk_head_dim());
    std::vector<Row> w(static_cast<std::size_t>(kDims.qk_nope_head_dim + kDims.v_head_dim));
    for (std::size_t r = 0; r < w.size(); ++r) {
      std::vector<float> weights(static_cast<std::size_t>(kDims.kv_lora_rank));
      fill_weight_row(generator_, kDims, {.layer = 1, .head = head, .row = static_cast<int>(r)},
                      weights.data());
      w[r].assign(weights.begin(), weights.end());
    }
    double sum = 0;
    Row out(static_cast<std::size_t>(kDims.v_head_dim));
    for (std::int64_t j = 0; j <= kPosition; ++j) {
      const std::uint64_t content = content_id(request_, j);
      Row latent = values(content, j, 0, ValueKind::key, kDims.kv_lora_rank);
      Row rotated = values(content, j, 0, ValueKind::value, kDims.qk_rope_head_dim);
      store(storage, latent, rotated);
      const auto project = [&](int r) {
        double x = 0;
        for (std::size_t l = 0; l < latent.size(); ++l)
          x += w[static_cast<std::size_t>(r)][l] * latent[l];
        return x;
      };
      double logit = 0;
      for (int i = 0; i < kDims.qk_nope_head_dim; ++i)
        logit += q[static_cast<std::size_t>(i)] * project(i);
      for (int d = 0; d < kDims.qk_rope_head_dim; ++d) {
        logit += q[static_cast<std::size_t>(kDims.qk_nope_head_dim + d)] *
                 rotated[static_cast<std::size_t>(d)];
      }
      const double p = std::exp(logit * static_cast<double>(*model_.scale));
      sum += p;
      for (int v = 0; v < kDims.v_head_dim; ++v)
        out[static_cast<std::size_t>(v)] += p * project(kDims.qk_nope_head_dim + v);
    }
    SampledRow row;
    row.request = &request_;
    row.position = kPosition;
    row.num_keys = row.first_rejected = kKeys;
    row.layer = 1;
    row.head = head;
    for (const double x : out) row.out.push_back(static_cast<float>(x / sum));
    row.lse = static_cast<float>(std::log(sum));
    return row;
  }

  CheckSummary check(const SampledRow& row, const KvStorage& storage) const {
    return check_rows({row}, model_, generator_, storage, *executor_);
  }

  ModelPreset model_;
  Request request_;
  ValueGenerator generator_{9, DType::f32};
  std::unique_ptr<Executor> executor_ = make_thread_pool(2);
};

const KvStorage kPlain{DType::f32}, kFp8{DType::fp8_e4m3}, kDsMla{DType::u8, KvFormat::fp8_ds_mla};

TEST_F(MlaCheckRows, KnowsWhatEveryCacheMakesOfARowOnBothPaths) {
  const std::vector<KvStorage> storages = {kPlain, kFp8, kDsMla};
  for (const KvStorage& made : storages) {
    SampledRow row = row_of(made);
    for (const KvStorage& assumed : storages) {
      for (const bool decode : {true, false}) {
        row.mla_decode = decode;
        const CheckSummary s = check(row, assumed);
        EXPECT_EQ(s.failed, made.dtype == assumed.dtype ? 0 : 1)
            << made.name() << " checked as " << assumed.name() << ", decode " << decode << ", "
            << s.worst_ratio_to_bound << " of the bound";
        if (made.dtype == assumed.dtype) {
          EXPECT_LT(s.worst_error, 1e-5);
        }
      }
    }
  }
}

TEST_F(MlaCheckRows, FailsARowOfAnotherPlaceOrAWrongNumber) {
  for (const bool decode : {true, false}) {
    SampledRow good = row_of(kDsMla);
    good.mla_decode = decode;
    ASSERT_EQ(check(good, kDsMla).failed, 0);
    for (const int change : {0, 1, 2, 3, 4, 5}) {
      SampledRow bad = good;
      if (change == 0) bad.head -= 1;
      if (change == 1) bad.layer -= 1;
      if (change == 2) bad.position -= 1;
      if (change == 3) bad.out[6] += 0.02F;
      if (change == 4) bad.lse += 0.01F;
      if (change == 5) bad.out[0] = std::numeric_limits<float>::quiet_NaN();
      EXPECT_EQ(check(bad, kDsMla).failed, 1) << change << " decode " << decode;
    }
  }
}

TEST_F(MlaCheckRows, RejectedDraftsHaveKeysOfTheirOwn) {
  SampledRow row = row_of(kPlain);
  row.first_rejected = kPosition - 1;
  EXPECT_EQ(check(row, kPlain).failed, 1);
}

}  // namespace
}  // namespace attend::serving
