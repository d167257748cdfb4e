// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/indexer_row.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "support/host_tensor.h"

namespace attend::oracle {
namespace {

using testing::HostTensor;

constexpr int kHeads = 5, kTokens = 40;

/// Logits of the last of some tokens by the ops.
class Ops {
 public:
  Ops() {
    testing::Rng rng(3);
    for (HostTensor* t : {&q, &k, &weights}) t->fill_normal(rng);
    norm_weight.fill_uniform(rng, 0.5F, 1.5F);
    norm_bias.fill_uniform(rng, -0.2F, 0.2F);
    for (std::int64_t p = 0; p < kTokens; ++p) {
      positions.as<std::int64_t>()[static_cast<std::size_t>(p)] = p;
      slots.as<std::int64_t>()[static_cast<std::size_t>(p)] = p;
      for (int i = 0; i < 32; ++i) {
        rope.view().select(0, p).as<float>()[i] = std::cos(0.1F * static_cast<float>(p * (i + 1)));
        rope.view().select(0, p).as<float>()[32 + i] =
            std::sin(0.1F * static_cast<float>(p * (i + 1)));
      }
    }
    PrepareIndexerArgs a;
    a.q = q;
    a.k = k;
    a.weights = weights;
    a.positions = positions;
    a.cos_sin_cache = rope;
    a.k_norm_weight = norm_weight;
    a.k_norm_bias = norm_bias;
    a.q_codes = codes;
    a.weights_out = scaled;
    a.k_out = keys;
    attend::prepare_indexer(a);
    indexer_k_quant_and_cache({keys, cache, slots, IndexerScale::ue8m0});
    const std::int32_t start = 0, end = kTokens;
    const auto* bytes = static_cast<const std::uint8_t*>(cache.view().data);
    Fp8MqaLogitsArgs l;
    l.q = codes.view().slice(0, kTokens - 1, 1);
    l.k = {bytes, DType::fp8_e4m3, {kTokens, 128}};
    l.k_scale = {bytes + std::ptrdiff_t{kTokens} * 128, DType::f32, {kTokens}};
    l.weights = scaled.view().slice(0, kTokens - 1, 1);
    l.ks = {&start, DType::i32, {1}};
    l.ke = {&end, DType::i32, {1}};
    l.logits = logits;
    attend::fp8_mqa_logits(l);
  }

  static std::vector<float> row(const HostTensor& t, std::int64_t i) {
    const TensorView v = t.view().select(0, i);
    std::vector<float> numbers;
    for (std::int64_t d = 0; d < v.numel(); ++d) numbers.push_back(to_f32(v.as<bf16>()[d]));
    return numbers;
  }
  IndexerRowProblem problem() const {
    IndexerRowProblem p;
    p.num_heads = kHeads;
    p.position = kTokens - 1;
    p.q = row(q, kTokens - 1);
    p.weights = row(weights, kTokens - 1);
    p.k_norm_weight.assign(norm_weight.as<float>().begin(), norm_weight.as<float>().end());
    p.k_norm_bias.assign(norm_bias.as<float>().begin(), norm_bias.as<float>().end());
    p.key = [this](std::int64_t j) { return row(k, j); };
    p.cos_sin = [this](std::int64_t position) {
      const auto* values = rope.view().select(0, position).as<float>();
      return std::vector<float>(values, values + 64);
    };
    return p;
  }
  /// Logits beyond their bounds.
  int wrong(const IndexerRowProblem& p) const {
    const IndexerLogits want = indexer_row(p);
    int count = 0;
    for (std::size_t j = 0; j < kTokens; ++j)
      count += std::abs(logits.as<float>()[j] - want.logits[j]) <= want.bound[j] ? 0 : 1;
    return count;
  }

  HostTensor q{DType::bf16, {kTokens, kHeads, 128}}, k{DType::bf16, {kTokens, 128}},
      weights{DType::bf16, {kTokens, kHeads}}, norm_weight{DType::f32, {128}},
      norm_bias{DType::f32, {128}}, positions{DType::i64, {kTokens}}, slots{DType::i64, {kTokens}},
      rope{DType::f32, {kTokens, 64}}, codes{DType::fp8_e4m3, {kTokens, kHeads, 128}},
      scaled{DType::f32, {kTokens, kHeads}}, keys{DType::bf16, {kTokens, 128}},
      cache{DType::u8, {1, kTokens, 132}}, logits{DType::f32, {1, kTokens}};
};

TEST(IndexerRowOracle, IsTheOpsWithinTheBounds) {
  const Ops ops;
  EXPECT_EQ(ops.wrong(ops.problem()), 0);
  IndexerRowProblem p = ops.problem();
  p.is_neox = false;
  EXPECT_GT(ops.wrong(p), kTokens / 2);
  p = ops.problem();
  p.weights[2] *= 1.01F;
  EXPECT_GT(ops.wrong(p), kTokens / 4);  // keys whose product with that head is positive
  p = ops.problem();
  p.key = [&](std::int64_t j) { return Ops::row(ops.k, j == 7 ? 8 : j); };
  EXPECT_EQ(ops.wrong(p), 1);
  p = ops.problem();
  p.k_norm_bias[100] += 0.5F;
  EXPECT_GT(ops.wrong(p), kTokens / 2);
}

}  // namespace
}  // namespace attend::oracle
