// SPDX-License-Identifier: Apache-2.0
// Differential attention against attention: its maps are those of flash_attn_varlen, bit for bit,
// and its end can be had apart. `attend check --op 'diff*'` compares with the oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "backend/allocation_counter.h"
#include "differential_batch.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

using Options = DifferentialBatchOptions;
using Batch = DifferentialBatch;

/// Requests of every kind: prefill, decode, a few tokens, keys around a piece's end, none at all.
std::vector<DifferentialRequest> mixed_requests() {
  return {{0, 40, 40}, {1, scaled(700, 300), 1}, {2, 257, 3}, {3, 300, 50}, {4, 0, 1}, {5, 2, 4}};
}

std::vector<Options> kinds() {
  std::vector<Options> all;
  const auto add = [&](DType dtype, DType cache, DifferentialVariant variant, HeadPairing pairing) {
    Options o;
    o.dtype = dtype;
    o.cache = cache;
    o.variant = variant;
    o.pairing = pairing;
    o.block_size = all.size() % 3 == 2 ? 0 : 16;
    o.hnd = all.size() % 2 == 1;
    all.push_back(o);
  };
  const auto v1 = DifferentialVariant::v1, v2 = DifferentialVariant::v2;
  const auto interleaved = HeadPairing::interleaved, halves = HeadPairing::halves;
  add(DType::f32, DType::f32, v1, interleaved);
  add(DType::bf16, DType::bf16, v1, halves);
  add(DType::f16, DType::f16, v1, interleaved);
  add(DType::bf16, DType::fp8_e4m3, v1, halves);
  add(DType::f32, DType::fp8_e5m2, v1, interleaved);
  add(DType::f16, DType::f16, v2, interleaved);
  add(DType::bf16, DType::bf16, v2, interleaved);
  add(DType::f32, DType::f32, v1, halves);
  return all;
}

std::string name_of(const Options& o) {
  return std::string(to_string(o.dtype)) + " " + std::string(to_string(o.cache)) +
         (o.is_v2() ? " v2" : "") + (o.pairing == HeadPairing::halves ? " halves" : "");
}

void expect_same_bytes(const TensorView& got, const TensorView& wanted) {
  ASSERT_EQ(got.numel(), wanted.numel());
  ASSERT_EQ(got.dtype, wanted.dtype);
  EXPECT_EQ(std::memcmp(got.data, wanted.data,
                        static_cast<std::size_t>(got.numel()) * size_of(got.dtype)),
            0);
}

/// Changes a batch's mask, and what else belongs to logits.
struct Feature {
  const char* name;
  void (*set)(AttentionParams&, const TensorView& by_head);
};
constexpr Feature kFeatures[] = {
    {"causal", [](AttentionParams&, const TensorView&) {}},
    {"all keys", [](AttentionParams& p, const TensorView&) { p.causal = false; }},
    {"window", [](AttentionParams& p, const TensorView&) { p.window_left = 37; }},
    {"window on both sides",
     [](AttentionParams& p, const TensorView&) {
       p.causal = false;
       p.window_left = 270;
       p.window_right = 2;
     }},
    {"softcap and scale",
     [](AttentionParams& p, const TensorView&) {
       p.softcap = 3.0F;
       p.scale = 0.5F;
     }},
    {"ALiBi", [](AttentionParams& p, const TensorView& t) { p.alibi_slopes = t; }},
    {"sqrt-ALiBi",
     [](AttentionParams& p, const TensorView& t) {
       p.alibi_slopes = t;
       p.alibi_sqrt = true;
     }},
    {"sinks",
     [](AttentionParams& p, const TensorView& t) {
       p.sinks = t;
       p.lse_includes_sink = true;
     }},
};

class Differential : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(Differential, MapsAreThoseOfFlashAttnVarlen) {
  for (Options o : kinds()) {
    for (const Feature& feature : kFeatures) {
      SCOPED_TRACE(name_of(o) + " " + feature.name);
      o.maps = true;
      Batch batch(o, mixed_requests());
      HostTensor by_head(DType::f32, {o.q_heads()});
      Rng rng(9);
      by_head.fill_uniform(rng, 0.01F, 0.9F);
      feature.set(batch.params, by_head);
      batch.run(nullptr, GetParam());
      // Maps are float32; attention rounds the same numbers to the type of its queries.
      const PlainMaps plain(batch, o.dtype, GetParam());
      expect_same_bytes(batch.lse, plain.lse);
      ASSERT_EQ(batch.maps.numel(), plain.out.numel());
      HostTensor rounded(o.dtype, {batch.maps.numel()});
      std::size_t next = 0;
      rounded.fill([&] { return batch.maps.as<float>()[next++]; });
      expect_same_bytes(rounded.view(), plain.out.view());
    }
  }
}

TEST_P(Differential, WithoutLambdaAndNormItIsTheFirstMap) {
  for (const Options& o : kinds()) {
    if (o.is_v2()) continue;
    SCOPED_TRACE(name_of(o));
    Batch batch(o, mixed_requests());
    batch.combine = {};
    batch.combine.norm = false;
    batch.run(nullptr, GetParam());
    const PlainMaps plain(batch, o.dtype, GetParam());
    expect_same_bytes(batch.lse, plain.lse);
    const std::size_t row = static_cast<std::size_t>(o.width()) * size_of(o.dtype);
    for (std::int64_t t = 0; t < batch.q.view().shape[0]; ++t) {
      for (int pair = 0; pair < o.q_heads() / 2; ++pair) {
        const TensorView got = batch.out.view().select(0, t).select(0, 2 * pair);
        const TensorView wanted =
            plain.out.view().select(0, t).select(0, batch.head(pair, 0, o.q_heads()));
        ASSERT_EQ(std::memcmp(got.data, wanted.data, row), 0) << "token " << t << " pair " << pair;
      }
    }
  }
}

TEST_P(Differential, CombinedMapsHaveTheFusedBits) {
  for (Options o : kinds()) {
    SCOPED_TRACE(name_of(o));
    for (const bool weight : {true, false}) {
      Batch fused(o, mixed_requests());
      o.maps = true;
      Batch maps(o, mixed_requests());
      o.maps = false;
      if (!weight) fused.combine.norm_weight = {};
      fused.run(nullptr, GetParam());
      maps.run(nullptr, GetParam());
      expect_same_bytes(fused.lse, maps.lse);
      DifferentialCombineArgs c;
      c.maps = maps.maps;
      c.out = maps.out;
      c.variant = o.variant;
      c.pairing = o.pairing;
      c.combine = fused.combine;
      for (const int workers : {1, 3}) {
        maps.out.fill_bytes(0xff);
        const auto pool = make_thread_pool(workers);
        differential_combine(c, pool.get(), GetParam());
        expect_same_bytes(maps.out, fused.out);
      }
      EXPECT_FALSE(has_nan(fused.out));
    }
  }
}

TEST_P(Differential, LambdaMovesTheResultAsDefined) {
  // A pair whose maps agree: softmax over equal keys; the difference is (1 - lambda) of it.
  Options o;
  o.dtype = o.cache = DType::f32;
  Batch batch(o, {{0, 20, 1}});
  batch.kv.fill([] { return 2.0F; });
  batch.combine.lambda = 0.25F;
  batch.combine.norm = false;
  batch.combine.norm_weight = {};
  batch.combine.out_scale = 0.5F;
  batch.run(nullptr, GetParam());
  for (const float x : batch.out.as<float>()) EXPECT_NEAR(x, 0.75F * 2.0F * 0.5F, 1e-5F);
  batch.combine.norm = true;
  batch.combine.norm_weight = batch.norm_weight;
  batch.run(nullptr, GetParam());
  for (int d = 0; d < o.width(); ++d)
    EXPECT_NEAR(batch.out.as<float>()[static_cast<std::size_t>(d)],
                0.5F * batch.norm_weight.as<float>()[static_cast<std::size_t>(d)], 1e-4F);
}

TEST_P(Differential, EveryHeadSizeHasTheMapsOfFlashAttnVarlen) {
  for (int dim = 8; dim <= 256; dim += scaled(8, 40)) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Options o;
      o.dtype = o.cache = dtype;
      o.dim = dim;
      o.kv_heads = 2;
      o.maps = dtype == DType::f32;
      SCOPED_TRACE(std::to_string(dim) + " " + name_of(o));
      Batch batch(o, {{0, 19, 5}, {1, 270, 1}});
      batch.combine = {};
      batch.combine.norm = false;
      batch.run(nullptr, GetParam());
      const PlainMaps plain(batch, dtype, GetParam());
      expect_same_bytes(batch.lse, plain.lse);
      if (o.maps) {
        expect_same_bytes(batch.maps, plain.out);
        continue;
      }
      for (std::int64_t t = 0; t < 6; ++t)
        for (int pair = 0; pair < 2; ++pair)
          ASSERT_EQ(std::memcmp(batch.out.view().select(0, t).select(0, 2 * pair).data,
                                plain.out.view().select(0, t).select(0, 2 * pair).data,
                                static_cast<std::size_t>(o.width()) * size_of(dtype)),
                    0);
    }
  }
}

TEST_P(Differential, ARowWithoutKeysIsZero) {
  for (const Options& o : kinds()) {
    SCOPED_TRACE(name_of(o));
    Batch batch(o, {{0, 0, 2}, {1, 1, 3}, {2, 40, 1}});
    batch.run(nullptr, GetParam());
    EXPECT_FALSE(has_nan(batch.out));
    for (int t = 0; t < 6; ++t) {
      const bool empty = t < 4;  // those of request 0, and the first two of request 1
      for (int h = 0; h < o.q_heads(); ++h)
        EXPECT_EQ(get(batch.lse, {t, h}) == -std::numeric_limits<double>::infinity(), empty) << t;
      const TensorView row = batch.out.view().select(0, t);
      for (std::int64_t h = 0; empty && h < row.shape[0]; ++h)
        for (int d = 0; d < o.dim; ++d) ASSERT_EQ(get(row, {h, d}), 0.0) << t;
    }
  }
}

TEST_P(Differential, APlannedCallAllocatesNothing) {
  const auto pool = make_thread_pool(3);
  for (const Options& o : kinds()) {
    Batch batch(o, {{0, 1500, 1}, {1, 40, 3}});
    AttentionPlanInput in = batch.plan_input(3);
    in.isa = GetParam();
    const AttentionPlan plan = plan_attention(in);
    Buffer memory(plan.workspace_bytes);
    DifferentialAttentionArgs a = batch.args();
    a.query_start_loc = a.seq_lens = a.cu_seqlens_kv = {};  // the plan has them
    differential_attention(a, plan, memory.workspace(), *pool);
    const std::size_t before = num_allocations();
    differential_attention(a, plan, memory.workspace(), *pool);
    EXPECT_EQ(num_allocations(), before) << name_of(o);
    const Batch::Rows planned = batch.rows();
    EXPECT_EQ(planned, batch.run(nullptr, GetParam())) << name_of(o);
  }
}

TEST_P(Differential, NoRequestsAreNoError) {
  Options o;
  o.block_size = 0;
  Batch batch(o, {});
  EXPECT_NO_THROW(differential_attention(batch.args(), nullptr, GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Levels, Differential, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

}  // namespace
}  // namespace attend::testing
