// SPDX-License-Identifier: Apache-2.0
// flash_mla_with_kvcache with indices has the bits of sparse_mla_attention; a second cache goes on
// where the first one ends.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/flash_mla.h"
#include "sparse_batch.h"

namespace attend::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

/// Tokens of requests with `num_tokens` tokens each; every token has keys of its own.
struct IndexedCall {
  IndexedCall(DType cache, int num_tokens, const std::vector<int>& keys, int topk)
      : batch(
            [&] {
              LatentOptions o;
              o.cache = cache;
              o.block_size = 64;
              o.causal = false;
              o.placement = 2;
              return o;
            }(),
            [&] {
              std::vector<LatentRequest> tokens;
              for (const int n : keys) tokens.push_back({static_cast<int>(tokens.size()), n, 1});
              return tokens;
            }()),
        sparse(batch, topk),
        num_tokens(num_tokens),
        num_reqs(static_cast<std::int64_t>(keys.size()) / num_tokens),
        lse(DType::f32, {num_reqs, 4, num_tokens}) {}

  FlashMlaWithKvCacheArgs args() const {
    const SparseMlaArgs s = sparse.args();
    FlashMlaWithKvCacheArgs a;
    a.q = {s.q.data, s.q.dtype, {num_reqs, num_tokens, 4, 576}};
    a.k_cache = {s.kv_cache.data,
                 s.kv_cache.dtype,
                 {s.kv_cache.shape[0], s.kv_cache.shape[1], 1, s.kv_cache.shape[2]}};
    a.is_fp8_kvcache = s.kv_cache.dtype == DType::u8;
    a.indices = {s.indices.data, DType::i32, {num_reqs, num_tokens, s.indices.shape[1]}};
    a.softmax_scale = s.scale;
    a.out = {s.out.data, s.out.dtype, {num_reqs, num_tokens, 4, 512}};
    a.lse = lse;
    return a;
  }
  double row_lse(std::int64_t token, std::int64_t head) const {
    return get(lse, {token / num_tokens, head, token % num_tokens});
  }
  std::int64_t tokens() const { return num_reqs * num_tokens; }

  LatentBatch batch;
  SparseBatch sparse;
  std::int64_t num_tokens, num_reqs;
  HostTensor lse;
};

class FlashMlaIndices : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(FlashMlaIndices, HaveTheBitsOfSparseAttention) {
  for (const DType cache : {DType::bf16, DType::u8}) {
    for (const int num_tokens : {1, 2, 4}) {
      IndexedCall c(cache, num_tokens, {300, 64, 0, 2}, 400);
      c.sparse.run(nullptr, GetParam());
      const auto out = c.batch.out.snapshot();
      c.batch.out.fill_bytes(0x5a);
      flash_mla_with_kvcache(c.args(), nullptr, GetParam());
      EXPECT_EQ(c.batch.out.snapshot(), out);
      for (std::int64_t t = 0; t < c.tokens(); ++t) {
        for (std::int64_t h = 0; h < 4; ++h) {
          const double wanted = get(c.batch.lse, {t, h});
          EXPECT_EQ(c.row_lse(t, h), wanted == -kInf ? kInf : wanted);
        }
      }
    }
  }
}

TEST_P(FlashMlaIndices, LengthsAreThoseOfARequest) {
  for (const int num_tokens : {1, 2}) {
    IndexedCall c(DType::u8, num_tokens, {30, 64, 20, 8}, 64);
    HostTensor lengths(DType::i32, {c.num_reqs});
    for (std::int64_t r = 0; r < c.num_reqs; ++r)
      lengths.as<std::int32_t>()[static_cast<std::size_t>(r)] = static_cast<std::int32_t>(3 * r);
    for (std::int64_t t = 0; t < 4; ++t)
      c.sparse.lengths.as<std::int32_t>()[static_cast<std::size_t>(t)] =
          static_cast<std::int32_t>(3 * (t / num_tokens));
    c.sparse.with_lengths = true;
    c.sparse.run(nullptr, GetParam());
    const auto out = c.batch.out.snapshot();
    FlashMlaWithKvCacheArgs a = c.args();
    a.topk_length = lengths;
    flash_mla_with_kvcache(a, nullptr, GetParam());
    EXPECT_EQ(c.batch.out.snapshot(), out);
  }
}

TEST_P(FlashMlaIndices, ASecondCacheGoesOnWhereTheFirstOneEnds) {
  for (const DType cache : {DType::bf16, DType::u8}) {
    for (const int num_tokens : {1, 2}) {
      // 256 keys in the first scope: a whole piece, then the bits are those of one list.
      IndexedCall c(cache, num_tokens, {400, 256, 300, 0}, 512);
      auto indices = c.sparse.indices.as<std::int32_t>();
      for (std::size_t t = 0; t < 4; ++t) {
        std::vector<std::int32_t> named;
        for (std::size_t i = 0; i < 512; ++i) {
          const std::int32_t slot = indices[t * 512 + i];
          if (slot >= 0 && slot < c.batch.cache.view().shape[0] * 64) named.push_back(slot);
        }
        named.resize(512, -1);
        std::copy(named.begin(), named.end(),
                  indices.begin() + static_cast<std::ptrdiff_t>(t * 512));
      }
      c.sparse.run(nullptr, GetParam());
      const auto out = c.batch.out.snapshot();
      FlashMlaWithKvCacheArgs a = c.args();
      a.extra_k_cache = a.k_cache;
      a.extra_indices = a.indices.slice(2, 256, 256);
      a.indices = a.indices.slice(2, 0, 256);
      c.batch.out.fill_bytes(0x5a);
      flash_mla_with_kvcache(a, nullptr, GetParam());
      EXPECT_EQ(c.batch.out.snapshot(), out);
      for (std::int64_t t = 0; t < 3; ++t) EXPECT_EQ(c.row_lse(t, 1), get(c.batch.lse, {t, 1}));
      EXPECT_EQ(c.row_lse(3, 1), kInf);
    }
  }
}

// Request r of the call, alone.
FlashMlaWithKvCacheArgs only(const FlashMlaWithKvCacheArgs& a, std::int64_t r) {
  FlashMlaWithKvCacheArgs one = a;
  one.q = a.q.slice(0, r, 1);
  one.indices = a.indices.slice(0, r, 1);
  if (a.extra_indices.defined()) one.extra_indices = a.extra_indices.slice(0, r, 1);
  one.out = a.out.slice(0, r, 1);
  one.lse = a.lse.slice(0, r, 1);
  return one;
}

TEST_P(FlashMlaIndices, BitsDoNotDependOnTheBatchTheTokensOfACallOrWorkers) {
  for (const DType cache : {DType::bf16, DType::u8}) {
    for (const bool extra : {false, true}) {
      const std::vector<int> keys = {900, 3, 256, 0};
      IndexedCall single(cache, 1, keys, 1000), pairs(cache, 2, keys, 1000);
      const auto call = [&](const IndexedCall& c) {
        FlashMlaWithKvCacheArgs a = c.args();
        if (!extra) return a;
        a.extra_k_cache = a.k_cache;
        a.extra_indices = a.indices.slice(2, 300, 700);
        a.indices = a.indices.slice(2, 0, 300);
        return a;
      };
      flash_mla_with_kvcache(call(single), nullptr, GetParam());
      const auto out = single.batch.out.snapshot(), lse = single.lse.snapshot();
      for (const int workers : {1, 2, 5}) {
        const auto pool = make_thread_pool(workers);
        single.batch.out.fill_bytes(0x5a);
        flash_mla_with_kvcache(call(single), pool.get(), GetParam());
        EXPECT_EQ(single.batch.out.snapshot(), out) << workers << " workers, extra " << extra;
        EXPECT_EQ(single.lse.snapshot(), lse);
        single.batch.out.fill_bytes(0x5a);
        for (std::int64_t r = 0; r < 4; ++r)
          flash_mla_with_kvcache(only(call(single), r), pool.get(), GetParam());
        EXPECT_EQ(single.batch.out.snapshot(), out) << "alone, extra " << extra;
        EXPECT_EQ(single.lse.snapshot(), lse);
        pairs.batch.out.fill_bytes(0x5a);
        flash_mla_with_kvcache(call(pairs), pool.get(), GetParam());
        EXPECT_EQ(pairs.batch.out.snapshot(), out) << "two tokens a request, extra " << extra;
      }
    }
  }
}

TEST_P(FlashMlaIndices, SinksCountOnceWithTwoCaches) {
  IndexedCall c(DType::bf16, 1, {100}, 100);
  FlashMlaWithKvCacheArgs a = c.args();
  flash_mla_with_kvcache(a, nullptr, GetParam());
  const double plain = get(c.batch.out, {0, 2, 5}), lse = c.row_lse(0, 2);
  HostTensor sink(DType::f32, {4});
  sink.as<float>()[0] = static_cast<float>(kInf);
  sink.as<float>()[2] = static_cast<float>(lse);
  a.attn_sink = sink;
  a.extra_k_cache = a.k_cache;
  a.extra_indices = a.indices.slice(2, 40, 60);
  a.indices = a.indices.slice(2, 0, 40);
  flash_mla_with_kvcache(a, nullptr, GetParam());
  EXPECT_NEAR(get(c.batch.out, {0, 2, 5}), plain / 2, 0.01 * std::abs(plain) + 1e-3);
  EXPECT_NEAR(c.row_lse(0, 2), lse, 1e-4);
  for (std::int64_t d = 0; d < 512; ++d) EXPECT_EQ(get(c.batch.out, {0, 0, d}), 0.0);
}

INSTANTIATE_TEST_SUITE_P(Levels, FlashMlaIndices, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

using A = FlashMlaWithKvCacheArgs;

struct BadCall {
  const char* label;
  const char* argument;
  std::function<void(A&)> change;
};
void PrintTo(const BadCall& b, std::ostream* os) { *os << b.label; }

const BadCall kBadCalls[] = {
    {"causal", "causal", [](A& a) { a.causal = true; }},
    {"dtype", "indices", [](A& a) { a.indices.dtype = DType::f32; }},
    {"rank", "indices", [](A& a) { a.indices = a.indices.select(0, 0); }},
    {"other_tokens", "indices", [](A& a) { a.indices.shape[1] = 1; }},
    {"none", "indices", [](A& a) { a.indices.shape[2] = 0; }},
    {"stride", "indices", [](A& a) { a.indices.strides[2] = 2; }},
    {"lengths", "topk_length", [](A& a) { a.topk_length = {a.q.data, DType::i32, {4}}; }},
    {"sink", "attn_sink", [](A& a) { a.attn_sink = {a.q.data, DType::f32, {3}}; }},
    {"extra_without_indices", "extra_indices", [](A& a) { a.extra_k_cache = a.k_cache; }},
    {"extra_without_cache", "extra_indices", [](A& a) { a.extra_indices = a.indices; }},
    {"extra_lengths_alone", "extra_topk_length",
     [](A& a) { a.extra_topk_length = {a.q.data, DType::i32, {2}}; }},
    {"extra_rows", "extra_k_cache",
     [](A& a) {
       a.extra_k_cache = a.k_cache.slice(3, 0, 512);
       a.extra_indices = a.indices;
     }},
    {"extra_tokens", "extra_indices",
     [](A& a) {
       a.extra_k_cache = a.k_cache;
       a.extra_indices = a.indices.slice(0, 0, 1);
     }},
    // Tokens of one request may not write over what those of another one read.
    {"out_in_indices_of_another_request", "out",
     [](A& a) { a.out.data = const_cast<void*>(a.indices.select(0, 1).data); }},
    {"lse_in_sinks", "lse", [](A& a) { a.attn_sink = {a.lse.data, DType::f32, {4}}; }},
    {"lengths_without_indices", "topk_length",
     [](A& a) {
       a.indices = {};
       a.topk_length = {a.q.data, DType::i32, {2}};
     }},
    {"sink_without_indices", "attn_sink",
     [](A& a) {
       a.indices = {};
       a.attn_sink = {a.q.data, DType::f32, {4}};
     }},
};

class FlashMlaIndicesBadInput : public ::testing::TestWithParam<BadCall> {};

TEST_P(FlashMlaIndicesBadInput, NamesTheArgumentAndWritesNothing) {
  IndexedCall c(DType::bf16, 2, {30, 4, 70, 1}, 128);
  A a = c.args();
  flash_mla_with_kvcache(a);  // as it is, the call is good
  c.batch.out.fill_bytes(0x5a);
  GetParam().change(a);
  const auto out = c.batch.out.snapshot(), lse = c.lse.snapshot();
  try {
    flash_mla_with_kvcache(a);
    ADD_FAILURE() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), GetParam().argument) << e.what();
    EXPECT_EQ(e.op(), "flash_mla_with_kvcache") << e.what();
  }
  EXPECT_EQ(c.batch.out.snapshot(), out);
  EXPECT_EQ(c.lse.snapshot(), lse);
}

INSTANTIATE_TEST_SUITE_P(All, FlashMlaIndicesBadInput, ::testing::ValuesIn(kBadCalls),
                         [](const auto& info) { return std::string(info.param.label); });

TEST(FlashMlaIndicesSchedule, IsThatOfTopkKeys) {
  IndexedCall c(DType::bf16, 2, {30, 4, 70, 1}, 128);
  HostTensor lengths(DType::i32, {2}), rows(DType::i32, {3, 8}), splits(DType::i32, {3});
  A a = c.args();
  a.tile_scheduler_metadata = rows;
  a.num_splits = splits;
  for (std::int32_t& n : lengths.as<std::int32_t>()) n = 128;
  get_mla_metadata({lengths, rows, splits});
  flash_mla_with_kvcache(a);
  lengths.as<std::int32_t>()[1] = 700;
  get_mla_metadata({lengths, rows, splits});
  EXPECT_THROW(flash_mla_with_kvcache(a), InvalidArgument);
}

}  // namespace
}  // namespace attend::testing
