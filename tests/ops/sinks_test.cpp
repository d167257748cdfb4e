// SPDX-License-Identifier: Apache-2.0
// Sinks and square-root ALiBi against formulas that share nothing with the kernels or the oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attend/ops/attention.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

constexpr int kQueries = 5, kKeys = 700, kHeads = 4, kDim = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();

/// One request of two kv heads.
struct Problem {
  Rng rng{7};
  int keys;
  HostTensor q{DType::f32, {kQueries, kHeads, kDim}};
  HostTensor k, v;
  HostTensor out{DType::f32, {kQueries, kHeads, kDim}};
  HostTensor lse{DType::f32, {kQueries, kHeads}};
  HostTensor query_start{DType::i32, {2}}, key_start{DType::i32, {2}};

  explicit Problem(int num_keys)
      : keys(num_keys), k(DType::f32, {num_keys, 2, kDim}), v(DType::f32, {num_keys, 2, kDim}) {
    q.fill_normal(rng);
    k.fill_normal(rng);
    v.fill_normal(rng);
    query_start.as<std::int32_t>()[1] = kQueries;
    key_start.as<std::int32_t>()[1] = keys;
  }
  FlashAttnVarlenArgs args() {
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
  void run(const AttentionParams& params, IsaLevel isa) {
    out.fill_bytes(0xff);
    lse.fill_bytes(0xff);
    FlashAttnVarlenArgs a = args();
    a.params = params;
    flash_attn_varlen(a, nullptr, isa);
  }
};

AttentionParams with_sinks(const HostTensor& sinks, bool in_lse) {
  AttentionParams p;
  p.causal = true;
  p.sinks = sinks;
  p.lse_includes_sink = in_lse;
  return p;
}

class Sinks : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(Sinks, ScaleTheOutputByTheShareOfTheKeys) {
  Problem plain(kKeys), sunk(kKeys);
  AttentionParams none;
  none.causal = true;
  plain.run(none, GetParam());
  HostTensor sinks(DType::f32, {kHeads});
  for (const float base : {-3.0F, 5.0F, 40.0F}) {
    for (int h = 0; h < kHeads; ++h) sinks.as<float>()[h] = base + static_cast<float>(h);
    for (const bool in_lse : {false, true}) {
      sunk.run(with_sinks(sinks, in_lse), GetParam());
      for (int i = 0; i < kQueries; ++i) {
        for (int h = 0; h < kHeads; ++h) {
          const double lse = get(plain.lse, {i, h}), sink = sinks.as<float>()[h];
          const double share = 1.0 / (1.0 + std::exp(sink - lse));
          const double total = std::max(lse, sink) + std::log1p(std::exp(-std::abs(sink - lse)));
          EXPECT_NEAR(get(sunk.lse, {i, h}), in_lse ? total : lse, 1e-5);
          for (int d = 0; d < kDim; ++d) {
            const double expected = share * get(plain.out, {i, h, d});
            ASSERT_NEAR(get(sunk.out, {i, h, d}), expected, 1e-5 * std::abs(expected) + 1e-9);
          }
        }
      }
    }
  }
}

TEST_P(Sinks, MinusInfinityIsNoSink) {
  Problem plain(kKeys), sunk(kKeys);
  AttentionParams none;
  none.causal = true;
  plain.run(none, GetParam());
  HostTensor sinks(DType::f32, {kHeads});
  for (float& s : sinks.as<float>()) s = -kInf;
  sunk.run(with_sinks(sinks, true), GetParam());
  EXPECT_EQ(sunk.out.snapshot(), plain.out.snapshot());
  EXPECT_EQ(sunk.lse.snapshot(), plain.lse.snapshot());
}

TEST_P(Sinks, ARowWithoutKeysIsZeroAndItsLseTheSink) {
  Problem p(kQueries - 2);  // bottom-right: the first two queries see nothing
  HostTensor sinks(DType::f32, {kHeads});
  for (int h = 0; h < kHeads; ++h) sinks.as<float>()[h] = 1.5F * static_cast<float>(h);
  for (const bool in_lse : {false, true}) {
    p.run(with_sinks(sinks, in_lse), GetParam());
    for (int i = 0; i < 2; ++i) {
      for (int h = 0; h < kHeads; ++h) {
        EXPECT_EQ(get(p.lse, {i, h}), in_lse ? sinks.as<float>()[h] : -kInf);
        for (int d = 0; d < kDim; ++d) EXPECT_EQ(get(p.out, {i, h, d}), 0.0);
      }
    }
    EXPECT_NE(get(p.out, {2, 0, 0}), 0.0);
  }
}

TEST_P(Sinks, SquareRootAlibiWeighsByTheRootOfTheDistance) {
  Problem p(kKeys);
  p.q.fill([] { return 0.0F; });  // logits are the bias alone
  HostTensor slopes(DType::f32, {kHeads});
  for (int h = 0; h < kHeads; ++h) slopes.as<float>()[h] = 0.1F * static_cast<float>(h + 1);
  AttentionParams params;
  params.alibi_slopes = slopes;
  params.alibi_sqrt = true;
  params.window_right = 2;  // keys after the position have no bias
  p.run(params, GetParam());
  for (int i = 0; i < kQueries; ++i) {
    const int position = i + kKeys - kQueries;
    for (int h = 0; h < kHeads; ++h) {
      double sum = 0.0, weighted = 0.0;
      for (int j = 0; j < std::min(kKeys, position + 3); ++j) {
        const double distance = j < position ? position - j : 0;
        const double w = std::exp(-slopes.as<float>()[h] * std::sqrt(distance));
        sum += w;
        weighted += w * get(p.v, {j, h / 2, 3});
      }
      EXPECT_NEAR(get(p.lse, {i, h}), std::log(sum), 1e-5);
      EXPECT_NEAR(get(p.out, {i, h, 3}), weighted / sum, 1e-5);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, Sinks, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

}  // namespace
}  // namespace attend::testing
