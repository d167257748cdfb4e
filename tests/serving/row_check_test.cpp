// SPDX-License-Identifier: Apache-2.0
#include "serving/row_check.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

namespace attend::serving {
namespace {

using ::testing::HasSubstr;

std::vector<std::int64_t> sample(std::int64_t capacity, std::uint64_t seed,
                                 const std::vector<std::int64_t>& portions) {
  ReservoirSampler sampler(capacity, seed);
  std::vector<std::int64_t> chosen;
  std::int64_t base = 0;
  for (const std::int64_t count : portions) {
    sampler.pass(count, [&](std::int64_t offset, std::int64_t slot) {
      EXPECT_GE(offset, 0);
      EXPECT_LT(offset, count);
      if (slot == static_cast<std::int64_t>(chosen.size())) chosen.emplace_back();
      ASSERT_LT(slot, static_cast<std::int64_t>(chosen.size()));
      chosen[static_cast<std::size_t>(slot)] = base + offset;
    });
    base += count;
  }
  return chosen;
}

TEST(ReservoirSampler, TakesEverythingFromAShortStream) {
  EXPECT_EQ(sample(5, 1, {3}), (std::vector<std::int64_t>{0, 1, 2}));
  EXPECT_EQ(sample(5, 1, {2, 0, 3}), (std::vector<std::int64_t>{0, 1, 2, 3, 4}));
  EXPECT_TRUE(sample(0, 1, {100}).empty());
}

TEST(ReservoirSampler, DependsOnTheSeedAndNotOnThePortions) {
  const auto whole = sample(10, 4, {1000});
  EXPECT_EQ(whole, sample(10, 4, {1, 499, 0, 500}));
  EXPECT_NE(whole, sample(10, 5, {1000}));
}

TEST(ReservoirSampler, EveryItemHasTheSameChance) {
  constexpr int kItems = 50, kCapacity = 5, kRuns = 4000;
  std::vector<int> counts(kItems);
  for (std::uint64_t seed = 0; seed < kRuns; ++seed) {
    for (const auto item : sample(kCapacity, seed, {kItems})) ++counts[item];
  }
  // 400 expected with a deviation of 19; five of them leave a chance of 1 in 35000 for 50 items.
  for (int i = 0; i < kItems; ++i) EXPECT_NEAR(counts[i], 400, 95) << "item " << i;
}

/// A row of a model small enough to compute here by hand.
class CheckRows : public ::testing::Test {
 protected:
  CheckRows() {
    model_.num_q_heads = 4;
    model_.num_kv_heads = 2;
    model_.head_dim = 8;
    request_.id = 3;
    request_.prompt_tokens = 10;
    request_.segments = {{5, 4}};
    row_.request = &request_;
    row_.step = 7;
    row_.position = 6;
    row_.num_keys = row_.first_rejected = 10;
    row_.layer = 1;
    row_.head = 3;
    attend();
  }

  std::vector<float> values(std::uint64_t content, std::int64_t p, int head, ValueKind kind) {
    std::vector<float> v(8);
    generator_.fill_f32({content, p, 1, head, kind}, 8, v.data());
    return v;
  }

  /// Rows as numbers that codes stand for, with a scale of their own or with given ones.
  static std::vector<float> coded(std::vector<float> row, std::span<const float> scales = {}) {
    float amax = 0;
    for (const float x : row) amax = std::max(amax, std::abs(x));
    for (std::size_t d = 0; d < row.size(); ++d) {
      const float scale = scales.empty() ? amax / 127 : scales[d];
      row[d] = std::clamp(std::nearbyint(row[d] / scale), -127.0F, 127.0F) * scale;
    }
    return row;
  }

  /// The fixture's row from a cache of that format.
  SampledRow row_of(KvFormat format) {
    const bool level = is_int8_level(format), level1 = format == KvFormat::int8_level1;
    const auto plain_q = values(own_content_id(request_), 6, 3, ValueKind::query);
    const auto q = level ? coded(plain_q) : plain_q;
    std::vector<double> logits;
    for (std::int64_t j = 0; j <= 6; ++j) {
      const auto k = coded(values(content_id(request_, j), j, 1, ValueKind::key));
      double logit = 0;
      for (int d = 0; d < 8; ++d) logit += static_cast<double>(q[d]) * k[d];
      logits.push_back(logit / std::sqrt(8.0));
    }
    const double largest = *std::max_element(logits.begin(), logits.end());
    double exact_sum = 0, sum = 0;
    std::vector<double> out(8);
    for (std::int64_t j = 0; j <= 6; ++j) {
      auto v = values(content_id(request_, j), j, 1, ValueKind::value);
      if (level1) v = coded(v, std::span(scales_.scales).subspan(24, 8));  // layer 1, head 1
      if (!level) v = coded(v);
      const double exact = std::exp(logits[static_cast<std::size_t>(j)] - largest);
      const double p = level1 ? std::nearbyint(exact * 127) / 127 : exact;
      exact_sum += exact;
      sum += p;
      for (int d = 0; d < 8; ++d) out[d] += p * v[d];
    }
    SampledRow row = row_;
    for (int d = 0; d < 8; ++d) row.out[d] = static_cast<float>(out[d] / sum);
    row.lse = static_cast<float>(largest + std::log(exact_sum));
    return row;
  }

  void attend() {
    const auto q = values(own_content_id(request_), 6, 3, ValueKind::query);
    double sum = 0;
    std::vector<double> out(8);
    for (std::int64_t j = 0; j <= 6; ++j) {
      const auto k = values(content_id(request_, j), j, 1, ValueKind::key);
      const auto v = values(content_id(request_, j), j, 1, ValueKind::value);
      double logit = 0;
      for (int d = 0; d < 8; ++d) logit += static_cast<double>(q[d]) * k[d];
      const double p = std::exp(logit / std::sqrt(8.0));
      sum += p;
      for (int d = 0; d < 8; ++d) out[d] += p * v[d];
    }
    for (const double x : out) row_.out.push_back(static_cast<float>(x / sum));
    row_.lse = static_cast<float>(std::log(sum));
  }

  CheckSummary check(const SampledRow& row) { return check(row, {generator_.dtype()}); }
  CheckSummary check(const SampledRow& row, const KvStorage& storage) {
    return check_rows({row}, model_, generator_, storage, *executor_);
  }

  ModelPreset model_;
  Request request_;
  ValueGenerator generator_{9, DType::f32};
  SampledRow row_;
  // Two layers, two heads; some values are beyond the range of their codes.
  ValueScales scales_{2, 2, 8, std::vector<float>(32)};
  std::unique_ptr<Executor> executor_ = make_thread_pool(2);
};

TEST_F(CheckRows, PassesACorrectRow) {
  const CheckSummary s = check(row_);
  EXPECT_EQ(s.rows, 1);
  EXPECT_EQ(s.failed, 0);
  EXPECT_LE(s.worst_ratio_to_bound, 1.0);
  EXPECT_LT(s.worst_error, 1e-6);
}

TEST_F(CheckRows, KnowsWhoseKeysEveryTypeOfAttentionHas) {
  const auto attend_encoder = [&](AttentionType type) {
    SampledRow row = row_;
    row.type = type;
    row.num_keys = 5;
    row.first_rejected = 10;
    const std::uint64_t encoder = encoder_content_id(request_);
    const std::uint64_t own = type == AttentionType::encoder ? encoder : own_content_id(request_);
    const auto q = values(own, 6, 3, ValueKind::query);
    double sum = 0;
    std::vector<double> out(8);
    for (std::int64_t j = 0; j < 5; ++j) {  // all of them, wherever the query stands
      const auto k = values(encoder, j, 1, ValueKind::key);
      const auto v = values(encoder, j, 1, ValueKind::value);
      double logit = 0;
      for (int d = 0; d < 8; ++d) logit += static_cast<double>(q[d]) * k[d];
      const double p = std::exp(logit / std::sqrt(8.0));
      sum += p;
      for (int d = 0; d < 8; ++d) out[d] += p * v[d];
    }
    for (int d = 0; d < 8; ++d) row.out[d] = static_cast<float>(out[d] / sum);
    row.lse = static_cast<float>(std::log(sum));
    return row;
  };
  SampledRow cross = attend_encoder(AttentionType::encoder_decoder);
  SampledRow encoder = attend_encoder(AttentionType::encoder);
  EXPECT_EQ(check(cross).failed, 0);
  EXPECT_EQ(check(encoder).failed, 0);
  std::swap(cross.type, encoder.type);
  EXPECT_EQ(check(cross).failed, 1);
  EXPECT_EQ(check(encoder).failed, 1);
  cross.type = AttentionType::decoder;
  EXPECT_EQ(check(cross).failed, 1);
}

TEST_F(CheckRows, KnowsWhatEveryInt8FormatMakesOfARow) {
  for (std::size_t i = 0; i < 32; ++i) {
    scales_.scales[i] = static_cast<float>(1.2 + 0.03 * static_cast<double>(i)) / 127;
  }
  const std::vector<KvStorage> storages = {{DType::f32},
                                           {DType::i8, KvFormat::int8_level1, &scales_},
                                           {DType::i8, KvFormat::int8_level2},
                                           {DType::i8, KvFormat::int8_per_token_head}};
  for (const KvStorage& made : storages) {
    const SampledRow row = made.format == KvFormat::plain ? row_ : row_of(made.format);
    for (const KvStorage& assumed : storages) {
      const CheckSummary s = check(row, assumed);
      EXPECT_EQ(s.failed, made.format == assumed.format ? 0 : 1)
          << to_string(made.format) << " checked as " << to_string(assumed.format) << ", "
          << s.worst_ratio_to_bound << " of the bound";
    }
  }
  ValueScales other = scales_;
  other.scales[24] *= 1.01F;
  const KvStorage wrong{DType::i8, KvFormat::int8_level1, &other};
  EXPECT_EQ(check(row_of(KvFormat::int8_level1), wrong).failed, 1);
}

TEST_F(CheckRows, FailsAWrongElementAndSaysWhere) {
  row_.out[5] += 1e-3F;
  const CheckSummary s = check(row_);
  EXPECT_EQ(s.failed, 1);
  EXPECT_NEAR(s.worst_error, 1e-3, 1e-5);
  ASSERT_EQ(s.failures.size(), 1U);
  EXPECT_THAT(s.failures[0], HasSubstr("request 3 position 6 layer 1 head 3 (step 7): out[5] is"));
}

TEST_F(CheckRows, FailsAWrongLse) {
  row_.lse += 1e-3F;
  const CheckSummary s = check(row_);
  EXPECT_EQ(s.failed, 1);
  EXPECT_THAT(s.failures[0], HasSubstr("lse is"));
}

TEST_F(CheckRows, FailsNaN) {
  SampledRow bad = row_;
  bad.out[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(check(bad).failed, 1);
  bad = row_;
  bad.lse = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(check(bad).failed, 1);
}

TEST_F(CheckRows, FailsARowOfAnotherHeadPositionOrLayer) {
  for (const auto change : {0, 1, 2}) {
    SampledRow bad = row_;
    (change == 0 ? bad.head : bad.layer) -= change == 1 ? 0 : 1;
    if (change == 1) bad.position -= 1;
    EXPECT_EQ(check(bad).failed, 1) << change;
  }
}

}  // namespace
}  // namespace attend::serving
