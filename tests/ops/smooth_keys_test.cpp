// SPDX-License-Identifier: Apache-2.0
// Keys that lose their mean before they are quantised: the mean, the codes, and what attention over
// them gives.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/int8_attention.h"
#include "attend/ops/quant.h"
#include "attend/oracle/attention.h"
#include "attend/oracle/quantize.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

constexpr int kHeads = 2, kDim = 32, kTokens = 48;

/// Keys whose channels are far from 0, some tokens a request.
struct Keys {
  HostTensor k{DType::bf16, {kTokens, kHeads, kDim}};
  std::vector<std::int32_t> start{0, 16, 16, kTokens};
  HostTensor mean{DType::f32, {3, kHeads, kDim}};

  Keys() {
    Rng rng(31);
    k.fill_normal(rng);
    for (int i = 0; i < k.numel(); ++i) {
      auto& x = k.as<bf16>()[static_cast<std::size_t>(i)];
      x = to_bf16(to_f32(x) + (i % 7 == 0 ? 20.0F : -3.0F));
    }
    mean.fill_bytes(0xff);
  }
  ChannelMeanArgs args() { return {k, {start.data(), DType::i32, {4}}, mean}; }
};

TEST(ChannelMean, IsTheMeanOfEachRequestAndZeroWithoutTokens) {
  for (const int threads : {1, 3}) {
    Keys keys;
    const auto executor = make_thread_pool(threads);
    channel_mean(keys.args(), executor.get());
    for (int r = 0; r < 3; ++r) {
      const auto i = static_cast<std::size_t>(r);
      for (int h = 0; h < kHeads; ++h) {
        for (int d = 0; d < kDim; ++d) {
          double sum = 0.0;
          for (int t = keys.start[i]; t < keys.start[i + 1]; ++t) sum += get(keys.k, {t, h, d});
          const double count = std::max(1, keys.start[i + 1] - keys.start[i]);
          EXPECT_EQ(get(keys.mean, {r, h, d}), static_cast<float>(sum / count));
        }
      }
    }
  }
}

TEST(ChannelMean, RefusesWhatDoesNotFit) {
  const std::vector<std::pair<const char*, std::function<void(Keys&, ChannelMeanArgs&)>>> cases{
      {"input", [](Keys&, ChannelMeanArgs& a) { a.input.dtype = DType::i8; }},
      {"start_loc", [](Keys& k, ChannelMeanArgs&) { k.start[3] = kTokens - 1; }},
      {"start_loc", [](Keys& k, ChannelMeanArgs&) { k.start[1] = 20; }},
      {"start_loc", [](Keys&, ChannelMeanArgs& a) { a.start_loc = {}; }},
      {"mean", [](Keys&, ChannelMeanArgs& a) { a.mean = a.mean.slice(0, 0, 2); }},
      {"mean", [](Keys&, ChannelMeanArgs& a) { a.mean.data = const_cast<void*>(a.input.data); }},
  };
  for (const auto& [argument, spoil] : cases) {
    Keys keys;
    ChannelMeanArgs a = keys.args();
    spoil(keys, a);
    const auto before = keys.mean.snapshot();
    try {
      channel_mean(a);
      ADD_FAILURE() << argument << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), argument) << e.what();
    }
    EXPECT_EQ(keys.mean.snapshot(), before);
  }
}

TEST(SmoothKeys, CodesAreThoseOfTheDifference) {
  Keys keys;
  channel_mean(keys.args());
  HostTensor codes(DType::i8, {kTokens, kHeads, kDim}), scale(DType::f32, {kTokens, kHeads});
  ScaledInt8QuantArgs a;
  a.input = keys.k;
  a.output = codes;
  a.scale = scale;
  a.mean = keys.mean.view().select(0, 0);
  scaled_int8_quant_for_attn(a);
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < kHeads; ++h) {
      std::vector<double> row;
      for (int d = 0; d < kDim; ++d)
        row.push_back(static_cast<float>(get(keys.k, {t, h, d})) -
                      static_cast<float>(get(keys.mean, {0, h, d})));
      const float expected = oracle::int8_scale(row);
      EXPECT_EQ(get(scale, {t, h}), expected);
      for (int d = 0; d < kDim; ++d) {
        EXPECT_EQ(codes.as<std::int8_t>()[static_cast<std::size_t>((t * kHeads + h) * kDim + d)],
                  oracle::int8_code(row[static_cast<std::size_t>(d)], expected));
      }
    }
  }
  a.mode = Int8QuantMode::per_channel;
  EXPECT_THROW(scaled_int8_quant_for_attn(a), InvalidArgument);
  a.mode = Int8QuantMode::per_token_head;
  a.mean = keys.mean.view().select(0, 0).slice(1, 0, 8);
  EXPECT_THROW(scaled_int8_quant_for_attn(a), InvalidArgument);
}

double coded(const HostTensor& codes, int at) {
  return codes.as<std::int8_t>()[static_cast<std::size_t>(at)];
}

/// Output error of one query over the keys of the last request, quantised with or without mean.
double error_of(bool smooth) {
  Keys keys;
  Rng rng(5);
  HostTensor q(DType::bf16, {1, kHeads, kDim}), v(DType::bf16, {kTokens, kHeads, kDim});
  q.fill_normal(rng);
  v.fill_normal(rng);
  HostTensor q8(DType::i8, {1, kHeads, kDim}), q_scale(DType::f32, {kHeads, 1});
  scaled_int8_quant_for_attn({.input = q, .output = q8, .scale = q_scale, .transpose_scale = true});
  keys.start = {0, kTokens, kTokens, kTokens};
  channel_mean(keys.args());
  HostTensor k8(DType::i8, {kTokens, kHeads, kDim}), k_scale(DType::f32, {kTokens, kHeads});
  ScaledInt8QuantArgs a{.input = keys.k, .output = k8, .scale = k_scale};
  if (smooth) a.mean = keys.mean.view().select(0, 0);
  scaled_int8_quant_for_attn(a);

  HostTensor out(DType::f32, {1, kHeads, kDim}), lse(DType::f32, {1, kHeads});
  const std::int32_t starts[] = {0, 1}, lens[] = {kTokens}, table[] = {0};
  // One block that holds all tokens: [1, H, T, D].
  const auto block = [](const HostTensor& t) {
    ConstTensorView view = t;
    view.rank = 4;
    view.shape = {1, kHeads, kTokens, kDim};
    view.strides = {0, kDim, kHeads * kDim, 1};
    return view;
  };
  FlashAttnVarlenInt8Args args;
  args.q = q8;
  args.q_scale = q_scale;
  args.k = block(k8);
  args.k_scale =
      ConstTensorView(k_scale.view().data, DType::f32, {1, kTokens, kHeads}).permute({0, 2, 1});
  args.v = block(v);
  if (smooth) args.k_mean = keys.mean.view().slice(0, 0, 1);
  args.out = out;
  args.lse = lse;
  args.query_start_loc = {starts, DType::i32, {2}};
  args.seq_lens = {lens, DType::i32, {1}};
  args.block_table = {table, DType::i32, {1, 1}};
  flash_attn_varlen_int8(args);

  double error = 0.0;
  for (int h = 0; h < kHeads; ++h) {
    oracle::RowProblem p;
    p.head_dim_qk = p.head_dim_v = kDim;
    p.num_keys = kTokens;
    p.causal = false;
    p.scale = 1.0 / std::sqrt(kDim);
    p.q = [&](int d) { return get(q, {0, h, d}); };
    p.k = [&](std::int64_t j, int d) { return get(keys.k, {j, h, d}); };
    p.v = [&](std::int64_t j, int d) { return get(v, {j, h, d}); };
    const oracle::RowResult want = oracle::attention_row(p);
    for (int d = 0; d < kDim; ++d)
      error += std::abs(get(out, {0, h, d}) - want.out[static_cast<std::size_t>(d)]);
    // The LSE is that of whole keys: it moves by no more than the codes move a logit.
    double moved = 0.0;
    for (int j = 0; j < kTokens; ++j) {
      double change = 0.0;
      for (int d = 0; d < kDim; ++d) {
        const double q_coded = coded(q8, h * kDim + d) * get(q_scale, {h, 0});
        double k_coded = coded(k8, (j * kHeads + h) * kDim + d) * get(k_scale, {j, h});
        if (smooth) k_coded += get(keys.mean, {0, h, d});
        change += q_coded * k_coded - p.q(d) * p.k(j, d);
      }
      moved = std::max(moved, p.scale * std::abs(change));
    }
    EXPECT_NEAR(get(lse, {0, h}), want.lse, moved + oracle::lse_error_bound(want, kDim));
  }
  return error;
}

TEST(SmoothKeys, AttentionOverThemIsCloserToTheTruth) {
  const double plain = error_of(false), smooth = error_of(true);
  EXPECT_LT(smooth, plain);  // how much it gains is measured on realistic data, by QuantScheme
}

}  // namespace
}  // namespace attend::testing
