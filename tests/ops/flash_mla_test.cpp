// SPDX-License-Identifier: Apache-2.0
// flash_mla_with_kvcache has the bits of mla_decode, in the layouts and conventions of FlashMLA.
#include "attend/ops/flash_mla.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "latent_batch.h"

namespace attend::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

/// As many query tokens for each request.
std::vector<LatentRequest> requests_of(int num_tokens, const std::vector<int>& keys) {
  std::vector<LatentRequest> requests;
  for (const int n : keys) requests.push_back({static_cast<int>(requests.size()), n, num_tokens});
  return requests;
}

/// The same rows for both functions, with a schedule.
struct FlashCall {
  FlashCall(LatentOptions o, int num_tokens, const std::vector<int>& keys)
      : batch([&] {
          o.block_size = 64;
          return LatentBatch(o, requests_of(num_tokens, keys));
        }()),
        num_tokens(num_tokens),
        num_reqs(static_cast<std::int64_t>(keys.size())),
        out(o.dtype, {num_reqs, num_tokens, o.heads, o.latent}),
        lse(DType::f32, {num_reqs, o.heads, num_tokens}),
        rows(DType::i32, {5, 8}),
        splits(DType::i32, {num_reqs + 1}) {
    get_mla_metadata({batch.seq_lens, rows, splits});
    clear();
  }
  void clear() {
    out.fill_bytes(0x5a);
    lse.fill_bytes(0x5a);
  }
  FlashMlaWithKvCacheArgs args() const {
    FlashMlaWithKvCacheArgs a;
    const LatentOptions& o = batch.options;
    a.q = {batch.q.view().data, o.dtype, {num_reqs, num_tokens, o.heads, o.dim}};
    const ConstTensorView cache = batch.cache;
    a.k_cache = {cache.data, cache.dtype, {cache.shape[0], 64, 1, cache.shape[2]}};
    a.block_table = batch.block_table;
    a.cache_seqlens = batch.seq_lens;
    a.head_dim_v = o.latent;
    a.tile_scheduler_metadata = rows;
    a.num_splits = splits;
    a.softmax_scale = *batch.args().params.scale;
    a.causal = o.causal;
    a.is_fp8_kvcache = o.cache == DType::u8;
    a.out = out;
    a.lse = lse;
    return a;
  }

  LatentBatch batch;
  std::int64_t num_tokens, num_reqs;
  HostTensor out, lse, rows, splits;
};

/// Results of both functions, after either has run.
void expect_same_results(const FlashCall& c) {
  ASSERT_EQ(c.out.snapshot(), c.batch.out.snapshot());
  for (std::int64_t r = 0; r < c.num_reqs; ++r) {
    for (std::int64_t t = 0; t < c.num_tokens; ++t) {
      for (int h = 0; h < c.batch.options.heads; ++h) {
        const double wanted = get(c.batch.lse, {r * c.num_tokens + t, h});
        ASSERT_EQ(get(c.lse, {r, h, t}), wanted == -kInf ? kInf : wanted) << r << " " << t;
      }
    }
  }
}

class FlashMla : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(FlashMla, HasTheBitsOfMlaDecode) {
  const auto pool = make_thread_pool(3);
  const std::pair<DType, DType> types[] = {{DType::bf16, DType::bf16},
                                           {DType::bf16, DType::u8},
                                           {DType::f16, DType::f16},
                                           {DType::f32, DType::f32}};
  for (const auto& [dtype, cache] : types) {
    for (const bool causal : {false, true}) {
      for (int num_tokens = 1; num_tokens <= 4; ++num_tokens) {
        LatentOptions o;
        o.dtype = dtype;
        o.cache = cache;
        o.causal = causal;
        o.placement = 3;
        SCOPED_TRACE(std::string(to_string(cache)) + (causal ? " causal " : " ") +
                     std::to_string(num_tokens));
        FlashCall c(o, num_tokens, {300, 64, 0, 2});
        c.batch.run(nullptr, GetParam());
        flash_mla_with_kvcache(c.args(), pool.get(), GetParam());
        expect_same_results(c);
      }
    }
  }
}

TEST_P(FlashMla, ARowWithoutKeysIsZeroAndInfinite) {
  LatentOptions o;
  FlashCall c(o, 3, {0, 2});
  flash_mla_with_kvcache(c.args(), nullptr, GetParam());
  for (int r = 0; r < 2; ++r) {
    for (int t = 0; t < 3; ++t) {
      const bool empty = r == 0 || t == 0;
      for (int h = 0; h < o.heads; ++h) {
        EXPECT_EQ(get(c.lse, {r, h, t}) == kInf, empty);
        EXPECT_FALSE(std::isnan(get(c.lse, {r, h, t})));
        for (int e = 0; empty && e < 512; ++e) ASSERT_EQ(get(c.out, {r, t, h, e}), 0.0);
      }
    }
  }
}

TEST_P(FlashMla, TakesOtherSizesAndAScaleOfTheirs) {
  for (const auto& [dim, latent] : {std::pair{576, 512}, {320, 256}, {64, 64}}) {
    LatentOptions o;
    o.dim = dim;
    o.latent = latent;
    FlashCall c(o, 2, {100, 70});
    FlashMlaWithKvCacheArgs a = c.args();
    a.softmax_scale.reset();
    a.tile_scheduler_metadata = a.num_splits = {};
    flash_mla_with_kvcache(a, nullptr, GetParam());
    MlaDecodeArgs wanted = c.batch.args();
    wanted.params.scale = 1.0F / std::sqrt(static_cast<float>(dim));
    mla_decode(wanted, nullptr, GetParam());
    expect_same_results(c);
  }
}

TEST_P(FlashMla, TakesStrides) {
  LatentOptions o;
  FlashCall c(o, 2, {100, 70});
  c.batch.run(nullptr, GetParam());
  // Token in front of request, with gaps between heads.
  HostTensor q(DType::bf16, {2, 2, 5, 576}), out(DType::bf16, {2, 2, 6, 520}),
      lse(DType::f32, {2, 5, 2});
  q.fill_bytes(0xff);
  out.fill_bytes(0x5a);
  lse.fill_bytes(0x5a);
  FlashMlaWithKvCacheArgs a = c.args();
  const auto swapped = [](TensorView t) {
    std::swap(t.strides[0], t.strides[1]);
    return t;
  };
  const TensorView to_q = swapped(q.view().slice(2, 0, 4)),
                   to_out = swapped(out.view().slice(2, 1, 4).slice(3, 0, 512));
  const auto row = [](const ConstTensorView& t, int r, int i, int h) {
    return t.select(0, r).select(0, i).select(0, h);
  };
  for (int r = 0; r < 2; ++r)
    for (int t = 0; t < 2; ++t)
      for (int h = 0; h < 4; ++h)
        std::memcpy(to_q.select(0, r).select(0, t).select(0, h).data, row(a.q, r, t, h).data, 1152);
  a.q = to_q;
  a.out = to_out;
  // [token, head, request] in memory.
  a.lse = lse.view().slice(1, 0, 4);
  std::swap(a.lse.strides[0], a.lse.strides[2]);
  flash_mla_with_kvcache(a, nullptr, GetParam());
  for (int r = 0; r < 2; ++r) {
    for (int t = 0; t < 2; ++t) {
      for (int h = 0; h < 4; ++h) {
        EXPECT_EQ(std::memcmp(row(to_out, r, t, h).data,
                              c.batch.out.view().select(0, r * 2 + t).select(0, h).data, 1024),
                  0);
        EXPECT_EQ(get(lse, {t, h, r}), get(c.batch.lse, {r * 2 + t, h}));
      }
      EXPECT_EQ(lse.view().select(0, t).select(0, 4).as<std::uint32_t>()[r], 0x5a5a5a5aU);
    }
  }
  for (int i = 0; i < 4; ++i)
    for (const int h : {0, 5}) EXPECT_EQ(row(out, i / 2, i % 2, h).as<std::uint16_t>()[7], 0x5a5a);
}

INSTANTIATE_TEST_SUITE_P(Levels, FlashMla, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

using A = FlashMlaWithKvCacheArgs;
using C = FlashCall;

struct BadCall {
  const char* label;
  const char* argument;
  std::function<void(A&, C&)> change;
  DType cache = DType::bf16;
};
void PrintTo(const BadCall& b, std::ostream* os) { *os << b.label; }

const BadCall kBadCalls[] = {
    {"q_undefined", "q", [](A& a, C&) { a.q = {}; }},
    {"q_rank", "q", [](A& a, C&) { a.q = a.q.select(0, 0); }},
    {"q_dtype", "q", [](A& a, C&) { a.q.dtype = DType::i8; }},
    {"q_stride", "q", [](A& a, C&) { a.q.strides[3] = 2; }},
    {"q_without_requests", "q",
     [](A& a, C&) { a.q.shape[0] = a.out.shape[0] = a.lse.shape[0] = 0; }},
    {"q_without_heads", "q", [](A& a, C&) { a.q.shape[2] = a.out.shape[2] = a.lse.shape[1] = 0; }},
    {"cache_undefined", "k_cache", [](A& a, C&) { a.k_cache = {}; }},
    {"cache_dtype", "k_cache", [](A& a, C&) { a.k_cache.dtype = DType::f16; }},
    {"cache_of_bytes", "k_cache", [](A& a, C&) { a.k_cache.dtype = DType::u8; }},
    {"cache_said_to_be_fp8", "k_cache", [](A& a, C&) { a.is_fp8_kvcache = true; }},
    {"block_size_32", "k_cache", [](A& a, C&) { a.k_cache = a.k_cache.slice(1, 0, 32); }},
    {"block_size_128", "k_cache",
     [](A& a, C&) {
       a.k_cache.shape[1] = 128;
       a.k_cache.shape[0] /= 2;
     }},
    {"two_key_heads", "k_cache", [](A& a, C&) { a.k_cache.shape[2] = 2; }},
    {"cache_dim", "k_cache", [](A& a, C&) { a.k_cache.shape[3] = 512; }},
    {"cache_stride", "k_cache", [](A& a, C&) { a.k_cache.strides[3] = 2; }},
    {"table_undefined", "block_table", [](A& a, C&) { a.block_table = {}; }},
    {"table_rows", "block_table", [](A& a, C&) { a.block_table.shape[0] = 1; }},
    {"table_dtype", "block_table", [](A& a, C&) { a.block_table.dtype = DType::f32; }},
    {"block_beyond_the_cache", "block_table",
     [](A&, C& c) { c.batch.block_table.as<std::int32_t>()[1] = 1000; }},
    {"block_negative", "block_table",
     [](A&, C& c) { c.batch.block_table.as<std::int32_t>()[0] = -1; }},
    {"lengths_undefined", "cache_seqlens", [](A& a, C&) { a.cache_seqlens = {}; }},
    {"lengths_of_another_batch", "cache_seqlens", [](A& a, C&) { a.cache_seqlens.shape[0] = 1; }},
    {"lengths_dtype", "cache_seqlens", [](A& a, C&) { a.cache_seqlens.dtype = DType::f32; }},
    {"length_negative", "cache_seqlens",
     [](A& a, C& c) {
       c.batch.seq_lens.as<std::int32_t>()[0] = -1;
       a.tile_scheduler_metadata = a.num_splits = {};
     }},
    {"length_beyond_the_table", "cache_seqlens",
     [](A& a, C& c) {
       c.batch.seq_lens.as<std::int32_t>()[0] = 1 << 20;
       a.tile_scheduler_metadata = a.num_splits = {};
     }},
    {"v_of_0", "head_dim_v", [](A& a, C&) { a.head_dim_v = 0; }},
    {"v_of_12", "head_dim_v", [](A& a, C&) { a.head_dim_v = 12; }},
    {"v_of_520", "head_dim_v", [](A& a, C&) { a.head_dim_v = 520; }},
    {"v_of_out", "out", [](A& a, C&) { a.head_dim_v = 256; }},
    {"scale_0", "softmax_scale", [](A& a, C&) { a.softmax_scale = 0.0F; }},
    {"scale_infinite", "softmax_scale", [](A& a, C&) { a.softmax_scale = INFINITY; }},
    {"out_undefined", "out", [](A& a, C&) { a.out = {}; }},
    {"out_dtype", "out", [](A& a, C&) { a.out.dtype = DType::f16; }},
    {"out_tokens", "out", [](A& a, C&) { a.out.shape[1] = 1; }},
    {"out_stride", "out", [](A& a, C&) { a.out.strides[3] = 2; }},
    {"out_rows_alias", "out", [](A& a, C&) { a.out.strides[1] = 0; }},
    {"out_is_q", "out", [](A& a, C& c) { a.out.data = c.batch.q.view().data; }},
    {"out_in_the_cache", "out", [](A& a, C& c) { a.out.data = c.batch.cache.view().data; }},
    {"lse_undefined", "lse", [](A& a, C&) { a.lse = {}; }},
    {"lse_dtype", "lse", [](A& a, C&) { a.lse.dtype = DType::i32; }},
    {"lse_as_tokens_and_heads", "lse", [](A& a, C&) { std::swap(a.lse.shape[1], a.lse.shape[2]); }},
    {"lse_rows_alias", "lse", [](A& a, C&) { a.lse.strides[0] = 0; }},
    {"lse_in_out", "lse", [](A& a, C& c) { a.lse.data = c.out.view().data; }},
    {"lse_in_splits", "lse", [](A& a, C& c) { a.num_splits.data = c.lse.view().data; }},
    {"schedule_without_splits", "num_splits", [](A& a, C&) { a.num_splits = {}; }},
    {"splits_without_schedule", "num_splits", [](A& a, C&) { a.tile_scheduler_metadata = {}; }},
    {"schedule_dtype", "tile_scheduler_metadata",
     [](A& a, C&) { a.tile_scheduler_metadata.dtype = DType::f32; }},
    {"schedule_columns", "tile_scheduler_metadata",
     [](A& a, C&) { a.tile_scheduler_metadata.shape[1] = 7; }},
    {"schedule_row", "tile_scheduler_metadata",
     [](A&, C& c) { c.rows.as<std::int32_t>()[3] += 1; }},
    {"splits_entry", "num_splits", [](A&, C& c) { c.splits.as<std::int32_t>()[1] += 1; }},
    {"splits_of_another_batch", "num_splits", [](A& a, C&) { a.num_splits.shape[0] = 2; }},
    {"ds_said_to_be_plain", "k_cache", [](A& a, C&) { a.is_fp8_kvcache = false; }, DType::u8},
    {"ds_queries_f16", "q", [](A& a, C&) { a.q.dtype = a.out.dtype = DType::f16; }, DType::u8},
    {"ds_rows_of_576", "k_cache", [](A& a, C&) { a.k_cache = a.k_cache.slice(3, 0, 576); },
     DType::u8},
    {"ds_queries_of_512", "q", [](A& a, C&) { a.q = a.q.slice(3, 0, 512); }, DType::u8},
    {"ds_block_size_32", "k_cache", [](A& a, C&) { a.k_cache = a.k_cache.slice(1, 0, 32); },
     DType::u8},
};

class FlashMlaBadInput : public ::testing::TestWithParam<BadCall> {};

TEST_P(FlashMlaBadInput, NamesTheArgumentAndWritesNothing) {
  LatentOptions o;
  o.cache = GetParam().cache;
  FlashCall c(o, 2, {300, 70});
  FlashMlaWithKvCacheArgs a = c.args();
  flash_mla_with_kvcache(a);  // as it is, the call is good
  c.clear();
  GetParam().change(a, c);
  const auto out = c.out.snapshot(), lse = c.lse.snapshot(), cache = c.batch.cache.snapshot();
  try {
    flash_mla_with_kvcache(a);
    ADD_FAILURE() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), GetParam().argument) << e.what();
    EXPECT_EQ(e.op(), "flash_mla_with_kvcache") << e.what();
  }
  EXPECT_EQ(c.out.snapshot(), out);
  EXPECT_EQ(c.lse.snapshot(), lse);
  EXPECT_EQ(c.batch.cache.snapshot(), cache);
}

INSTANTIATE_TEST_SUITE_P(All, FlashMlaBadInput, ::testing::ValuesIn(kBadCalls),
                         [](const auto& info) { return std::string(info.param.label); });

TEST(FlashMlaSchedule, OfOtherLengthsIsRefused) {
  FlashCall c({}, 1, {300, 70}), other({}, 1, {300, 700});
  FlashMlaWithKvCacheArgs a = c.args();
  a.tile_scheduler_metadata = other.rows;
  a.num_splits = other.splits;
  EXPECT_THROW(flash_mla_with_kvcache(a), InvalidArgument);
}

}  // namespace
}  // namespace attend::testing
