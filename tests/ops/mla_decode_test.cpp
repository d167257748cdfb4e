// SPDX-License-Identifier: Apache-2.0
// Rows of mla_decode do not depend on how a cache holds its numbers, on groups of heads, workers,
// neighbours or places.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "attend/core/float_types.h"
#include "attend/ops/mla_cache.h"
#include "backend/allocation_counter.h"
#include "latent_batch.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

using Rows = LatentBatch::Rows;

/// `got` has rows of `wanted` only, and they have the same bits.
void expect_same(const Rows& got, const Rows& wanted) {
  ASSERT_FALSE(got.empty());
  for (const auto& [key, bytes] : got) {
    ASSERT_TRUE(wanted.contains(key));
    ASSERT_EQ(bytes, wanted.at(key)) << "request " << key.first << " position " << key.second;
  }
}

bool has_nan(const HostTensor& t) {
  switch (t.view().dtype) {
    case DType::f32:
      return std::ranges::any_of(t.as<float>(), [](float x) { return std::isnan(x); });
    case DType::f16:
      return std::ranges::any_of(t.as<f16>(), [](f16 x) { return std::isnan(to_f32(x)); });
    default:
      return std::ranges::any_of(t.as<bf16>(), [](bf16 x) { return std::isnan(to_f32(x)); });
  }
}

struct Types {
  DType dtype, cache;
};
constexpr Types kAllTypes[] = {{DType::bf16, DType::bf16},     {DType::bf16, DType::u8},
                               {DType::f16, DType::f16},       {DType::f32, DType::f32},
                               {DType::bf16, DType::fp8_e4m3}, {DType::f16, DType::fp8_e5m2}};
const auto kTypes = std::span(kAllTypes).first(static_cast<std::size_t>(scaled(6, 2)));
/// Some of these numbers, the first ones under ATTEND_TEST_SCALE=small.
std::vector<int> some_of(std::vector<int> all, int small) {
  all.resize(static_cast<std::size_t>(scaled(static_cast<int>(all.size()), small)));
  return all;
}

LatentOptions options_of(const Types& t, int heads) {
  LatentOptions o;
  o.dtype = t.dtype;
  o.cache = t.cache;
  o.heads = heads;
  return o;
}

std::string name_of(const LatentOptions& o) {
  return std::string(to_string(o.dtype)) + " " + std::string(to_string(o.cache));
}

class MlaDecode : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(MlaDecode, RowsOfFp8DsMlaAreTheBf16RowsThatTheGatherMakes) {
  for (const int heads : some_of({20, 1, 16}, 1)) {
    for (const int block_size : some_of({16, 1, 64}, 1)) {
      LatentOptions o = options_of({DType::bf16, DType::u8}, heads);
      o.block_size = block_size;
      o.placement = 7;
      LatentBatch codes(o, {{0, 1, 1}, {1, 255, 1}, {2, 257, 3}, {3, 600, 4}, {4, 64, 1}});
      LatentBatch plain = upconverted(codes);
      const Rows wanted = plain.run(nullptr, GetParam());
      expect_same(codes.run(nullptr, GetParam()), wanted);
      EXPECT_FALSE(has_nan(codes.out));
    }
  }
}

TEST_P(MlaDecode, BitsDoNotDependOnWorkersOrGroupsOfHeads) {
  constexpr int kHeads = 12;
  for (const Types& types : kTypes) {
    LatentBatch batch(options_of(types, kHeads),
                      {{0, scaled(1100, 520), 1}, {1, 37, 2}, {2, 258, 1}});
    SCOPED_TRACE(name_of(batch.options));
    const auto one = make_thread_pool(1);
    const Rows wanted = batch.run(one.get(), GetParam());
    for (const int workers : some_of({3, 1, 2, 5}, 1)) {
      const auto pool = make_thread_pool(workers);
      for (const int groups : some_of({1, 3, 2, 4, 6, 12}, 2)) {
        AttentionPlanInput in = batch.plan_input(workers);
        in.num_kv_heads = groups;
        in.isa = GetParam();
        const AttentionPlan plan = plan_attention(in);
        Buffer memory(plan.workspace_bytes);
        std::fill_n(static_cast<unsigned char*>(memory.data()), memory.size(), 0xff);
        batch.out.fill_bytes(0xff);
        batch.lse.fill_bytes(0xff);
        mla_decode(batch.args(), plan, memory.workspace(), *pool);
        expect_same(batch.rows(), wanted);
      }
    }
  }
}

TEST_P(MlaDecode, BitsDoNotDependOnNeighboursPlacesOrTokensACall) {
  const auto pool = make_thread_pool(3);
  for (const Types& types : kTypes) {
    LatentOptions o = options_of(types, 20);
    SCOPED_TRACE(name_of(o));
    LatentBatch crowd(o, {{3, 90, 1}, {0, 700, 4}, {1, 256, 1}, {2, 17, 9}, {5, 0, 1}});
    const Rows wanted = crowd.run(pool.get(), GetParam());
    EXPECT_FALSE(has_nan(crowd.out));
    for (const int placement : some_of({1, 2}, 1)) {
      for (const int block_size : some_of({48, 1, 4, 8, 16, 256}, 1)) {
        o.placement = static_cast<unsigned>(placement);
        o.block_size = block_size;
        expect_same(LatentBatch(o, {{0, 700, 4}}).run(nullptr, GetParam()), wanted);
      }
    }
    for (int keys = scaled(697, 700); keys <= 700; ++keys)
      expect_same(LatentBatch(o, {{0, keys, 1}}).run(nullptr, GetParam()), wanted);
    expect_same(LatentBatch(o, {{2, 15, 7}, {1, 256, 1}}).run(nullptr, GetParam()), wanted);
  }
}

TEST_P(MlaDecode, IsSoftmaxOverTheRows) {
  LatentOptions o = options_of({DType::f32, DType::f32}, 3);
  for (const auto& [dim, latent] : {std::pair{576, 512}, {320, 256}, {24, 16}, {16, 16}}) {
    o.dim = dim;
    o.latent = latent;
    LatentBatch batch(o, {{0, 300, 2}, {1, 5, 1}});
    batch.run(nullptr, GetParam());
    std::int64_t token = 0;
    for (std::int64_t r = 0; r < 2; ++r) {
      const LatentRequest& request = batch.requests[static_cast<std::size_t>(r)];
      for (int i = 0; i < request.query; ++i, ++token) {
        const int visible = request.keys - request.query + i + 1;
        for (int h = 0; h < o.heads; ++h) {
          double sum = 0.0, value = 0.0;
          for (int j = 0; j < visible; ++j) {
            const auto block =
                static_cast<std::int64_t>(get(batch.block_table, {r, j / o.block_size}));
            double logit = 0.0;
            for (int e = 0; e < dim; ++e)
              logit += get(batch.q, {token, h, e}) * get(batch.cache, {block, j % o.block_size, e});
            const double weight = std::exp(logit * double{*batch.args().params.scale});
            sum += weight;
            value += weight * get(batch.cache, {block, j % o.block_size, latent - 1});
          }
          EXPECT_NEAR(get(batch.lse, {token, h}), std::log(sum), 2e-5);
          EXPECT_NEAR(get(batch.out, {token, h, latent - 1}), value / sum, 2e-5);
        }
      }
    }
  }
}

TEST_P(MlaDecode, CodesStandForMultiplesOfTheScale) {
  for (const DType codes : {DType::fp8_e4m3, DType::fp8_e5m2}) {
    LatentBatch batch(options_of({DType::f32, codes}, 5), {{0, 300, 1}, {1, 20, 2}});
    LatentOptions o = batch.options;
    o.cache = DType::f32;
    LatentBatch plain(o, batch.requests);
    for (const float scale : {0.75F, 0.05F}) {
      batch.kv_scale.as<float>()[0] = scale;
      // The two caches have the same blocks.
      HostTensor starts(DType::i32, {3});
      starts.as<std::int32_t>()[1] = 300;
      starts.as<std::int32_t>()[2] = 320;
      HostTensor rows(DType::f32, {320, 576});
      gather_and_maybe_dequant_cache({.src_cache = batch.cache,
                                      .dst = rows,
                                      .block_table = batch.block_table,
                                      .cu_seq_lens = starts,
                                      .scale = batch.kv_scale});
      for (int i = 0; i < 320; ++i) {
        const std::int64_t r = i < 300 ? 0 : 1, p = i < 300 ? i : i - 300;
        const auto block = static_cast<std::int64_t>(get(plain.block_table, {r, p / 16}));
        std::ranges::copy(rows.as<float>().subspan(static_cast<std::size_t>(i) * 576, 576),
                          plain.cache.view().select(0, block).select(0, p % 16).as<float>());
      }
      batch.run(nullptr, GetParam());
      plain.run(nullptr, GetParam());
      for (std::int64_t i = 0; i < batch.out.numel(); ++i)
        ASSERT_NEAR(batch.out.as<float>()[static_cast<std::size_t>(i)],
                    plain.out.as<float>()[static_cast<std::size_t>(i)], 1e-4F * scale);
      for (std::int64_t i = 0; i < batch.lse.numel(); ++i)
        ASSERT_NEAR(batch.lse.as<float>()[static_cast<std::size_t>(i)],
                    plain.lse.as<float>()[static_cast<std::size_t>(i)], 1e-4F);
    }
  }
}

TEST_P(MlaDecode, ARowWithoutKeysIsZero) {
  for (const Types& types : kTypes) {
    LatentBatch batch(options_of(types, 2), {{0, 0, 2}, {1, 1, 3}, {2, 40, 1}});
    batch.run(nullptr, GetParam());
    for (int t = 0; t < 6; ++t) {
      const bool empty = t < 4;  // those of request 0, and the first two of request 1
      for (int h = 0; h < 2; ++h) {
        const double lse = get(batch.lse, {t, h});
        EXPECT_EQ(lse == -std::numeric_limits<double>::infinity(), empty) << t;
        for (int c = 0; empty && c < 512; ++c) ASSERT_EQ(get(batch.out, {t, h, c}), 0.0) << t;
      }
    }
    EXPECT_FALSE(has_nan(batch.out));
  }
}

TEST_P(MlaDecode, WorksWithoutLseAndWithStridedTensors) {
  LatentBatch batch(options_of({DType::bf16, DType::u8}, 4), {{0, 300, 2}, {1, 20, 1}});
  const Rows wanted = batch.run(nullptr, GetParam());
  const auto lse = batch.lse.snapshot();
  // Rows of q, out and cache with something between them.
  HostTensor wide_q(DType::bf16, {3, 5, 592}), wide_out(DType::bf16, {3, 6, 520});
  const std::int64_t blocks = batch.cache.view().shape[0];
  HostTensor wide_cache(DType::u8, {blocks, 17, 672});
  wide_q.fill_bytes(0xff);
  wide_cache.fill_bytes(0xff);
  wide_out.fill_bytes(0x5a);
  MlaDecodeArgs a = batch.args();
  const TensorView q = wide_q.view().slice(1, 0, 4).slice(2, 8, 576),
                   out = wide_out.view().slice(1, 1, 4).slice(2, 0, 512),
                   cache = wide_cache.view().slice(1, 0, 16).slice(2, 16, 656);
  for (int t = 0; t < 3; ++t)
    for (int h = 0; h < 4; ++h)
      std::copy_n(batch.q.view().select(0, t).select(0, h).as<bf16>(), 576,
                  q.select(0, t).select(0, h).as<bf16>());
  for (std::int64_t b = 0; b < blocks; ++b)
    for (int i = 0; i < 16; ++i)
      std::copy_n(batch.cache.view().select(0, b).select(0, i).as<std::uint8_t>(), 656,
                  cache.select(0, b).select(0, i).as<std::uint8_t>());
  a.q = q;
  a.kv_cache = cache;
  a.out = out;
  a.lse = {};
  batch.out.fill_bytes(0xff);
  mla_decode(a, nullptr, GetParam());
  for (int t = 0; t < 3; ++t) {
    for (int h = 0; h < 6; ++h) {
      const bool used = h >= 1 && h < 5;
      if (used)
        std::copy_n(wide_out.view().select(0, t).select(0, h).as<bf16>(), 512,
                    batch.out.view().select(0, t).select(0, h - 1).as<bf16>());
      for (int c = used ? 512 : 0; c < 520; ++c)
        ASSERT_EQ(wide_out.view().select(0, t).select(0, h).as<std::uint16_t>()[c], 0x5a5a);
    }
  }
  EXPECT_EQ(batch.rows(), wanted);
  EXPECT_EQ(batch.lse.snapshot(), lse);
}

TEST_P(MlaDecode, APlannedCallAllocatesNothing) {
  const auto pool = make_thread_pool(3);
  for (const Types& types : kTypes) {
    LatentBatch batch(options_of(types, 32), {{0, 1500, 1}, {1, 40, 3}});
    AttentionPlanInput in = batch.plan_input(3);
    in.isa = GetParam();
    const AttentionPlan plan = plan_mla_decode(in);
    Buffer memory(plan.workspace_bytes);
    MlaDecodeArgs a = batch.args();
    a.query_start_loc = a.seq_lens = {};  // the plan has them
    mla_decode(a, plan, memory.workspace(), *pool);
    const std::size_t before = num_allocations();
    mla_decode(a, plan, memory.workspace(), *pool);
    EXPECT_EQ(num_allocations(), before) << name_of(batch.options);
    const Rows planned = batch.rows();
    expect_same(planned, batch.run(nullptr, GetParam()));
  }
}

TEST_P(MlaDecode, NoRequestsAreNoError) {
  LatentBatch batch(options_of({DType::bf16, DType::u8}, 4), {});
  EXPECT_NO_THROW(mla_decode(batch.args(), nullptr, GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Levels, MlaDecode, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST(MlaHeadGroups, AreAsManyAsWorkersNeedAndStayLarge) {
  EXPECT_EQ(mla_head_groups(128, 1, 1), 1);
  EXPECT_EQ(mla_head_groups(128, 1, 3), 4);
  EXPECT_EQ(mla_head_groups(128, 2, 4), 2);
  EXPECT_EQ(mla_head_groups(128, 64, 4), 1);
  EXPECT_EQ(mla_head_groups(128, 1, 1000), 8);  // 16 heads each
  EXPECT_EQ(mla_head_groups(256, 64, 1), 2);    // 128 heads each
  EXPECT_EQ(mla_head_groups(48, 1, 8), 2);
  EXPECT_EQ(mla_head_groups(3, 1, 8), 1);
  for (int heads = 1; heads <= 160; ++heads)
    for (const int workers : {1, 7, 64}) EXPECT_EQ(heads % mla_head_groups(heads, 1, workers), 0);
}

}  // namespace
}  // namespace attend::testing
