// SPDX-License-Identifier: Apache-2.0
// flash_mla_sparse_fwd has the bits of sparse_mla_attention, in the conventions of FlashMLA.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>

#include "attend/core/error.h"
#include "attend/ops/flash_mla.h"
#include "attend/oracle/sparse_mla.h"
#include "sparse_batch.h"

namespace attend::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

LatentOptions rows_of(DType dtype) {
  LatentOptions o;
  o.dtype = o.cache = dtype;
  o.block_size = 1;
  o.causal = false;
  return o;
}

FlashMlaSparseFwdArgs flash_args(const SparseMlaArgs& s) {
  FlashMlaSparseFwdArgs a;
  a.q = s.q;
  a.kv = s.kv_cache;
  a.indices = {s.indices.data, DType::i32, {s.indices.shape[0], 1, s.indices.shape[1]}};
  a.topk_length = s.topk_length;
  a.sm_scale = *s.scale;
  a.d_v = static_cast<int>(s.out.shape[2]);
  a.out = s.out;
  a.max_logits = s.max_logits;
  a.lse = s.lse;
  return a;
}

class FlashMlaSparse : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(FlashMlaSparse, HasTheBitsOfSparseAttention) {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const int dim : {576, 512}) {
      LatentOptions o = rows_of(dtype);
      o.dim = dim;
      LatentBatch batch(o, {{0, 400, 1}, {1, 3, 1}, {2, 0, 1}});
      SparseBatch sparse(batch, 600);
      sparse.run(nullptr, GetParam());
      const auto out = batch.out.snapshot(), max_logits = sparse.max_logits.snapshot();
      HostTensor lse(DType::f32, {3, 4});
      FlashMlaSparseFwdArgs a = flash_args(sparse.args());
      a.lse = lse;
      flash_mla_sparse_fwd(a, nullptr, GetParam());
      EXPECT_EQ(batch.out.snapshot(), out);
      EXPECT_EQ(sparse.max_logits.snapshot(), max_logits);
      for (std::int64_t h = 0; h < 4; ++h) {
        EXPECT_EQ(get(lse, {0, h}), get(batch.lse, {0, h}));
        EXPECT_EQ(get(lse, {1, h}), get(batch.lse, {1, h}));
        EXPECT_EQ(get(lse, {2, h}), kInf);
        EXPECT_EQ(get(sparse.max_logits, {2, h}), -kInf);
      }
    }
  }
}

TEST_P(FlashMlaSparse, BitsDoNotDependOnTheBatchOrWorkers) {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    LatentBatch batch(rows_of(dtype), {{0, 900, 1}, {1, 3, 1}, {2, 256, 1}});
    SparseBatch sparse(batch, 1000);
    const FlashMlaSparseFwdArgs all = flash_args(sparse.args());
    flash_mla_sparse_fwd(all, nullptr, GetParam());
    const auto out = batch.out.snapshot(), lse = batch.lse.snapshot(),
               max_logits = sparse.max_logits.snapshot();
    for (const int workers : {1, 2, 5}) {
      const auto pool = make_thread_pool(workers);
      batch.out.fill_bytes(0x5a);
      flash_mla_sparse_fwd(all, pool.get(), GetParam());
      EXPECT_EQ(batch.out.snapshot(), out) << workers;
      batch.out.fill_bytes(0x5a);
      for (std::int64_t t = 0; t < 3; ++t) {
        FlashMlaSparseFwdArgs one = all;
        one.q = all.q.slice(0, t, 1);
        one.indices = all.indices.slice(0, t, 1);
        one.out = all.out.slice(0, t, 1);
        one.lse = all.lse.slice(0, t, 1);
        one.max_logits = all.max_logits.slice(0, t, 1);
        flash_mla_sparse_fwd(one, pool.get(), GetParam());
      }
      EXPECT_EQ(batch.out.snapshot(), out) << workers << " workers, alone";
      EXPECT_EQ(batch.lse.snapshot(), lse);
      EXPECT_EQ(sparse.max_logits.snapshot(), max_logits);
    }
  }
}

// The reference does not know an order: another one stays within the same bounds of it.
TEST_P(FlashMlaSparse, AnotherOrderStaysWithinTheBounds) {
  Rng rng(31);
  SCOPED_TRACE(rng.trace());
  for (const DType dtype : {DType::bf16, DType::f32}) {
    LatentBatch batch(rows_of(dtype), {{0, 700, 1}});
    SparseBatch sparse(batch, 700);
    const SparseMlaArgs s = sparse.args();
    const oracle::SparseMlaResult wanted = oracle::sparse_mla_attention(s);
    const auto indices = sparse.indices.as<std::int32_t>();
    for (int order = 0; order < 3; ++order) {
      flash_mla_sparse_fwd(flash_args(s), nullptr, GetParam());
      for (std::int64_t h = 0; h < 4; ++h) {
        const auto at = static_cast<std::size_t>(h);
        EXPECT_NEAR(get(batch.lse, {0, h}), wanted.lse[at], wanted.lse_bound[at]);
        for (std::int64_t d = 0; d < 512; ++d) {
          const auto i = static_cast<std::size_t>(h * 512 + d);
          ASSERT_NEAR(get(batch.out, {0, h, d}), wanted.out[i], wanted.out_bound[i]);
        }
      }
      for (std::size_t i = indices.size(); i > 1; --i)
        std::swap(indices[i - 1],
                  indices[static_cast<std::size_t>(rng.integer(0, static_cast<int>(i) - 1))]);
    }
  }
}

TEST_P(FlashMlaSparse, SinksTakeTheirShareOfTheOutputAlone) {
  LatentBatch batch(rows_of(DType::f32), {{0, 40, 1}});
  SparseBatch sparse(batch, 64);
  FlashMlaSparseFwdArgs a = flash_args(sparse.args());
  flash_mla_sparse_fwd(a, nullptr, GetParam());
  const auto plain = batch.out.snapshot(), lse = batch.lse.snapshot(),
             max_logits = sparse.max_logits.snapshot();
  const float* before = reinterpret_cast<const float*>(plain.data());
  HostTensor sink(DType::f32, {4});
  sink.as<float>()[0] = kInf;
  sink.as<float>()[1] = -kInf;
  sink.as<float>()[2] = batch.lse.as<float>()[2];
  sink.as<float>()[3] = 0.5F;
  a.attn_sink = sink;
  flash_mla_sparse_fwd(a, nullptr, GetParam());
  EXPECT_EQ(batch.lse.snapshot(), lse);
  EXPECT_EQ(sparse.max_logits.snapshot(), max_logits);
  const double share = 1.0 / (1.0 + std::exp(0.5 - get(batch.lse, {0, 3})));
  for (std::int64_t d = 0; d < 512; ++d) {
    EXPECT_EQ(get(batch.out, {0, 0, d}), 0.0);
    EXPECT_EQ(get(batch.out, {0, 1, d}), before[512 + d]);
    EXPECT_NEAR(get(batch.out, {0, 2, d}), 0.5 * before[1024 + d], 1e-5);
    EXPECT_NEAR(get(batch.out, {0, 3, d}), share * before[1536 + d], 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, FlashMlaSparse, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

struct BadCall {
  const char* label;
  const char* argument;
  std::function<void(FlashMlaSparseFwdArgs&)> change;
};
void PrintTo(const BadCall& b, std::ostream* os) { *os << b.label; }

using A = FlashMlaSparseFwdArgs;

const BadCall kBadCalls[] = {
    {"q_dtype", "q", [](A& a) { a.q.dtype = DType::i8; }},
    {"kv_dtype", "kv", [](A& a) { a.kv.dtype = DType::f16; }},
    {"kv_heads", "kv", [](A& a) { a.kv.shape[1] = 2; }},
    {"kv_dim", "kv", [](A& a) { a.kv.shape[2] = 512; }},
    {"indices_rank", "indices", [](A& a) { a.indices = a.indices.select(1, 0); }},
    {"indices_heads", "indices", [](A& a) { a.indices.shape[1] = 2; }},
    {"indices_none", "indices", [](A& a) { a.indices.shape[2] = 0; }},
    {"indices_stride", "indices", [](A& a) { a.indices.strides[2] = 2; }},
    {"indices_dtype", "indices", [](A& a) { a.indices.dtype = DType::f32; }},
    {"lengths_rank", "topk_length", [](A& a) { a.topk_length = a.indices; }},
    {"scale_unset", "sm_scale", [](A& a) { a.sm_scale = 0.0F; }},
    {"scale_nan", "sm_scale", [](A& a) { a.sm_scale = NAN; }},
    {"value_of_520", "out", [](A& a) { a.d_v = 520; }},
    {"lse_undefined", "lse", [](A& a) { a.lse = {}; }},
    {"max_logits_undefined", "max_logits", [](A& a) { a.max_logits = {}; }},
    {"max_logits_is_lse", "max_logits", [](A& a) { a.max_logits = a.lse; }},
    {"sink_of_other_heads", "attn_sink", [](A& a) { a.attn_sink = {a.q.data, DType::f32, {3}}; }},
};

class FlashMlaSparseBadInput : public ::testing::TestWithParam<BadCall> {};

TEST_P(FlashMlaSparseBadInput, NamesTheArgumentAndWritesNothing) {
  LatentBatch batch(rows_of(DType::bf16), {{0, 40, 1}, {1, 9, 1}});
  SparseBatch sparse(batch, 64);
  FlashMlaSparseFwdArgs a = flash_args(sparse.args());
  flash_mla_sparse_fwd(a);  // as it is, the call is good
  batch.out.fill_bytes(0x5a);
  GetParam().change(a);
  const auto out = batch.out.snapshot(), lse = batch.lse.snapshot();
  try {
    flash_mla_sparse_fwd(a);
    ADD_FAILURE() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), GetParam().argument) << e.what();
    EXPECT_EQ(e.op(), "flash_mla_sparse_fwd") << e.what();
  }
  EXPECT_EQ(batch.out.snapshot(), out);
  EXPECT_EQ(batch.lse.snapshot(), lse);
}

TEST(FlashMlaSparseSinks, OfNanAreRefused) {
  LatentBatch batch(rows_of(DType::bf16), {{0, 40, 1}});
  SparseBatch sparse(batch, 64);
  HostTensor sink(DType::f32, {4});
  sink.as<float>()[3] = NAN;
  FlashMlaSparseFwdArgs a = flash_args(sparse.args());
  a.attn_sink = sink;
  EXPECT_THROW(flash_mla_sparse_fwd(a), InvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(All, FlashMlaSparseBadInput, ::testing::ValuesIn(kBadCalls),
                         [](const auto& info) { return std::string(info.param.label); });

}  // namespace
}  // namespace attend::testing
