// SPDX-License-Identifier: Apache-2.0
#include "serving/differential_row_check.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "serving/differential_layer.h"

namespace attend::serving {
namespace {

using Row = std::vector<double>;

constexpr int kDim = 8, kHeads = 8, kKvHeads = 4, kKeys = 9, kPosition = 7, kPair = 2;

/// What a code of E4M3 stands for, for the code nearest to x.
double e4m3(double x) {
  if (x == 0.0) return x;
  const double ulp = std::ldexp(1.0, std::max(std::ilogb(x), -6) - 3);
  return std::clamp(std::nearbyint(x / ulp) * ulp, -448.0, 448.0);
}

/// What a faulty layer would do.
struct Fault {
  bool swap_queries = false, swap_keys = false, swap_values = false;
  double lambda = 0.0;  ///< added to it
  bool leave_out_norm = false, leave_out_weight = false, leave_out_factor = false;
  int key_layer = -1;  ///< other than the one whose cache the layer attends to
};

/// Rows of layers that are computed here by hand, in double.
class DifferentialCheckRows : public ::testing::TestWithParam<HeadPairing> {
 protected:
  DifferentialCheckRows() {
    model_.num_q_heads = kHeads;
    model_.num_kv_heads = kKvHeads;
    model_.head_dim = kDim;
    model_.num_layers = 3;
    model_.scale = 0.4F;
    model_.differential = DifferentialPreset{.pairing = GetParam(), .norm_weight = true};
    model_.caching_layers = 2;  // layer 2 attends to the cache of layer 1
    request_.id = 3;
    request_.prompt_tokens = 10;
    request_.segments = {{5, 4}};
  }

  /// The heads of a pair, as the paper's two ways of writing them say.
  static int head_of(int pair, int branch, int heads) {
    return GetParam() == HeadPairing::halves ? branch * (heads / 2) + pair : pair * 2 + branch;
  }

  Row values(std::uint64_t content, std::int64_t p, int layer, int head, ValueKind kind) const {
    std::vector<float> v(kDim);
    generator_.fill_f32({content, p, layer, head, kind}, kDim, v.data());
    return Row(v.begin(), v.end());
  }

  double lambda_of(const DifferentialLayerConfig& c, int layer) const {
    double first = 0, second = 0;
    for (std::size_t d = 0; d < kDim; ++d) {
      first += static_cast<double>(c.lambda_q1[d]) * static_cast<double>(c.lambda_k1[d]);
      second += static_cast<double>(c.lambda_q2[d]) * static_cast<double>(c.lambda_k2[d]);
    }
    return std::exp(first) - std::exp(second) + 0.8 - 0.6 * std::exp(-0.3 * layer);
  }

  SampledRow row_of(int layer, bool fp8, const Fault& fault = {}) const {
    const int kv_pair = kPair / (kHeads / kKvHeads);
    const int key_layer = fault.key_layer >= 0 ? fault.key_layer : std::min(layer, 1);
    const auto stored = [&](ValueKind kind, std::int64_t j, int branch) {
      Row row =
          values(content_id(request_, j), j, key_layer, head_of(kv_pair, branch, kKvHeads), kind);
      for (double& x : row) x = fp8 ? e4m3(x) : x;
      return row;
    };
    Row map[2];
    double lse[2];
    for (const int b : {0, 1}) {
      const Row q =
          values(own_content_id(request_), kPosition, layer,
                 head_of(kPair, fault.swap_queries ? 1 - b : b, kHeads), ValueKind::query);
      double sum = 0;
      map[b].assign(2 * kDim, 0.0);
      for (std::int64_t j = 0; j <= kPosition; ++j) {
        const Row k = stored(ValueKind::key, j, fault.swap_keys ? 1 - b : b);
        double logit = 0;
        for (std::size_t d = 0; d < kDim; ++d) logit += q[d] * k[d];
        const double p = std::exp(logit * static_cast<double>(*model_.scale));
        sum += p;
        for (const int half : {0, 1}) {
          const Row v = stored(ValueKind::value, j, fault.swap_values ? 1 - half : half);
          for (std::size_t d = 0; d < kDim; ++d)
            map[b][static_cast<std::size_t>(half) * kDim + d] += p * v[d];
        }
      }
      for (double& x : map[b]) x /= sum;
      lse[b] = std::log(sum);
    }
    SampledRow row;
    row.request = &request_;
    row.position = kPosition;
    row.num_keys = row.first_rejected = kKeys;
    row.layer = layer;
    row.head = kPair;
    row.lse = static_cast<float>(lse[0]);
    row.second_lse = static_cast<float>(lse[1]);
    combine(map[0], map[1], fault, row);
    return row;
  }

  void combine(const Row& first, const Row& second, const Fault& fault, SampledRow& row) const {
    const DifferentialLayerConfig c = make_differential_layer(model_, row.layer, generator_);
    const double lambda = lambda_of(c, row.layer) + fault.lambda;
    Row out;
    double squares = 0;
    for (std::size_t d = 0; d < first.size(); ++d) {
      out.push_back(first[d] - lambda * second[d]);
      squares += out[d] * out[d];
    }
    const double norm = fault.leave_out_norm ? 1.0 : std::sqrt(squares / (2 * kDim) + 1e-5);
    const double factor =
        fault.leave_out_factor ? 1.0 : 1.0 - (0.8 - 0.6 * std::exp(-0.3 * row.layer));
    for (std::size_t d = 0; d < out.size(); ++d) {
      const double weight = fault.leave_out_weight ? 1.0 : static_cast<double>(c.norm_weight[d]);
      row.out.push_back(static_cast<float>(out[d] / norm * weight * factor));
    }
  }

  CheckSummary check(const SampledRow& row, DType stored = DType::f32) const {
    return check_rows({row}, model_, generator_, KvStorage{stored}, *executor_);
  }

  ModelPreset model_;
  Request request_;
  ValueGenerator generator_{9, DType::f32};
  std::unique_ptr<Executor> executor_ = make_thread_pool(2);
};

TEST_P(DifferentialCheckRows, KnowsWhatEveryCacheMakesOfARowOfEveryLayer) {
  for (const int layer : {0, 1, 2}) {
    for (const bool fp8 : {false, true}) {
      for (const DType assumed : {DType::f32, DType::fp8_e4m3, DType::fp8_e5m2}) {
        const CheckSummary s = check(row_of(layer, fp8), assumed);
        const bool same = assumed == (fp8 ? DType::fp8_e4m3 : DType::f32);
        EXPECT_EQ(s.failed, same ? 0 : 1) << layer << fp8 << " checked as " << to_string(assumed)
                                          << ", " << s.worst_ratio_to_bound << " of the bound";
        if (same) {
          EXPECT_LT(s.worst_error, 1e-5);
        }
      }
    }
  }
}

TEST_P(DifferentialCheckRows, FailsARowOfAnotherPlaceOrAWrongNumber) {
  const SampledRow good = row_of(1, false);
  ASSERT_EQ(check(good).failed, 0);
  for (int change = 0; change < 8; ++change) {
    SampledRow bad = good;
    if (change == 0) bad.head -= 1;
    if (change == 1) bad.layer -= 1;
    if (change == 2) bad.position -= 1;
    if (change == 3) bad.out[2 * kDim - 1] += 0.001F;
    if (change == 4) bad.lse += 0.001F;
    if (change == 5) bad.second_lse += 0.001F;
    if (change == 6) bad.out[0] = std::numeric_limits<float>::quiet_NaN();
    if (change == 7) std::swap(bad.lse, bad.second_lse);
    EXPECT_EQ(check(bad).failed, 1) << change;
  }
}

TEST_P(DifferentialCheckRows, FailsWhatAFaultyLayerWouldCompute) {
  const std::vector<Fault> faults = {
      {.swap_queries = true, .swap_keys = true},  // the maps are exchanged
      {.swap_queries = true},
      {.swap_keys = true},
      {.swap_values = true},
      {.lambda = 0.002},
      {.leave_out_norm = true},
      {.leave_out_weight = true},
      {.leave_out_factor = true},
      {.key_layer = 2},
      {.key_layer = 0},
  };
  ASSERT_EQ(check(row_of(2, false)).failed, 0);
  for (std::size_t i = 0; i < faults.size(); ++i)
    EXPECT_EQ(check(row_of(2, false, faults[i])).failed, 1) << i;
}

TEST_P(DifferentialCheckRows, RejectedDraftsHaveKeysOfTheirOwn) {
  SampledRow row = row_of(1, false);
  row.first_rejected = kPosition - 1;
  EXPECT_EQ(check(row).failed, 1);
}

TEST_P(DifferentialCheckRows, AFailureNamesThePair) {
  SampledRow row = row_of(1, false);
  row.second_lse += 1;
  const CheckSummary s = check(row);
  ASSERT_EQ(s.failures.size(), 1U);
  EXPECT_THAT(s.failures[0], ::testing::HasSubstr("layer 1 pair 2"));
  EXPECT_THAT(s.failures[0], ::testing::HasSubstr("lse of the second map"));
}

INSTANTIATE_TEST_SUITE_P(Pairings, DifferentialCheckRows,
                         ::testing::Values(HeadPairing::interleaved, HeadPairing::halves));

}  // namespace
}  // namespace attend::serving
