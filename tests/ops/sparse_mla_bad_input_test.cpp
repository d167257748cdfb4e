// SPDX-License-Identifier: Apache-2.0
// Whatever is wrong with a call of sparse_mla_attention, the error names it and nothing is written.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>

#include "attend/core/error.h"
#include "sparse_batch.h"

namespace attend::testing {
namespace {

using A = SparseMlaArgs;

struct BadCall {
  const char* label;
  const char* argument;
  std::function<void(A&, LatentBatch&)> change;
  DType cache = DType::bf16;
};
void PrintTo(const BadCall& b, std::ostream* os) { *os << b.label; }

const BadCall kBadCalls[] = {
    {"no_scale", "scale", [](A& a, LatentBatch&) { a.scale.reset(); }},
    {"scale_0", "scale", [](A& a, LatentBatch&) { a.scale = 0.0F; }},
    {"scale_nan", "scale", [](A& a, LatentBatch&) { a.scale = NAN; }},
    {"q_undefined", "q", [](A& a, LatentBatch&) { a.q = {}; }},
    {"q_dtype", "q", [](A& a, LatentBatch&) { a.q.dtype = DType::i8; }},
    {"q_stride", "q", [](A& a, LatentBatch&) { a.q.strides[2] = 2; }},
    {"q_without_heads", "q", [](A& a, LatentBatch&) { a.q = a.q.slice(1, 0, 0); }},
    {"cache_undefined", "kv_cache", [](A& a, LatentBatch&) { a.kv_cache = {}; }},
    {"cache_dtype", "kv_cache", [](A& a, LatentBatch&) { a.kv_cache.dtype = DType::f16; }},
    {"cache_dim", "kv_cache", [](A& a, LatentBatch&) { a.kv_cache.shape[2] = 512; }},
    {"cache_of_576_bytes", "kv_cache", [](A& a, LatentBatch&) { a.kv_cache.dtype = DType::u8; }},
    {"cache_blocks_of_0", "kv_cache", [](A& a, LatentBatch&) { a.kv_cache.shape[1] = 0; }},
    {"cache_rows_too_far_apart", "kv_cache",
     [](A& a, LatentBatch&) { a.kv_cache.strides[0] = (std::int64_t{1} << 31) * 576; }},
    {"indices_undefined", "indices", [](A& a, LatentBatch&) { a.indices = {}; }},
    {"indices_dtype", "indices", [](A& a, LatentBatch&) { a.indices.dtype = DType::f32; }},
    {"indices_rank", "indices", [](A& a, LatentBatch&) { a.indices = a.indices.select(0, 0); }},
    {"indices_of_other_tokens", "indices",
     [](A& a, LatentBatch&) { a.indices = a.indices.slice(0, 0, 1); }},
    {"indices_none", "indices", [](A& a, LatentBatch&) { a.indices = a.indices.slice(1, 0, 0); }},
    {"indices_stride", "indices", [](A& a, LatentBatch&) { a.indices.strides[1] = 2; }},
    {"lengths_dtype", "topk_length",
     [](A& a, LatentBatch&) { a.topk_length = a.lse.select(1, 0); }},
    {"lengths_of_other_tokens", "topk_length",
     [](A& a, LatentBatch& b) { a.topk_length = b.query_start_loc; }},
    {"out_undefined", "out", [](A& a, LatentBatch&) { a.out = {}; }},
    {"out_dtype", "out", [](A& a, LatentBatch&) { a.out.dtype = DType::f16; }},
    {"out_rows_alias", "out", [](A& a, LatentBatch&) { a.out.strides[0] = 0; }},
    {"out_in_the_cache", "out", [](A& a, LatentBatch& b) { a.out.data = b.cache.view().data; }},
    {"latent_of_12", "out", [](A& a, LatentBatch&) { a.out.shape[2] = 12; }},
    {"lse_shape", "lse", [](A& a, LatentBatch&) { a.lse.shape[1] = 3; }},
    {"lse_in_out", "lse", [](A& a, LatentBatch& b) { a.lse.data = b.out.view().data; }},
    {"max_logits_dtype", "max_logits", [](A& a, LatentBatch&) { a.max_logits.dtype = DType::i32; }},
    {"max_logits_shape", "max_logits", [](A& a, LatentBatch&) { a.max_logits.shape[0] = 1; }},
    {"max_logits_is_lse", "max_logits", [](A& a, LatentBatch&) { a.max_logits = a.lse; }},
    {"max_logits_in_indices", "max_logits",
     [](A& a, LatentBatch&) { a.max_logits.data = const_cast<void*>(a.indices.data); }},
    {"sinks_of_other_heads", "sinks", [](A& a, LatentBatch& b) { a.sinks = b.kv_scale; }},
    {"scale_of_a_bf16_cache", "kv_scale", [](A& a, LatentBatch& b) { a.kv_scale = b.kv_scale; }},
    {"no_kv_scale", "kv_scale", [](A& a, LatentBatch&) { a.kv_scale = {}; }, DType::fp8_e4m3},
    {"ds_queries_of_512", "q", [](A& a, LatentBatch&) { a.q = a.q.slice(2, 0, 512); }, DType::u8},
    {"ds_latent_of_256", "out", [](A& a, LatentBatch&) { a.out = a.out.slice(2, 0, 256); },
     DType::u8},
    {"ds_rows_of_584", "kv_cache",
     [](A& a, LatentBatch&) { a.kv_cache = a.kv_cache.slice(2, 0, 584); }, DType::u8},
};

class SparseMlaBadInput : public ::testing::TestWithParam<BadCall> {};

TEST_P(SparseMlaBadInput, NamesTheArgumentAndWritesNothing) {
  LatentOptions o;
  o.cache = GetParam().cache;
  LatentBatch batch(o, {{0, 30, 1}, {1, 70, 1}});
  SparseBatch sparse(batch, 128);
  sparse.run(nullptr, {});  // as it is, the call is good
  A a = sparse.args();
  GetParam().change(a, batch);
  const auto out = batch.out.snapshot(), lse = batch.lse.snapshot(),
             max_logits = sparse.max_logits.snapshot();
  try {
    sparse_mla_attention(a);
    ADD_FAILURE() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), GetParam().argument) << e.what();
    EXPECT_EQ(e.op(), "sparse_mla_attention") << e.what();
  }
  EXPECT_EQ(batch.out.snapshot(), out);
  EXPECT_EQ(batch.lse.snapshot(), lse);
  EXPECT_EQ(sparse.max_logits.snapshot(), max_logits);
}

INSTANTIATE_TEST_SUITE_P(All, SparseMlaBadInput, ::testing::ValuesIn(kBadCalls),
                         [](const auto& info) { return std::string(info.param.label); });

TEST(SparseMlaCacheOfBytes, OfNoFormatIsToldTheFormats) {
  LatentOptions o;
  o.cache = DType::u8;
  LatentBatch batch(o, {{0, 30, 1}});
  SparseBatch sparse(batch, 64);
  A a = sparse.args();
  a.kv_cache.shape[2] = 600;
  try {
    sparse_mla_attention(a);
    ADD_FAILURE() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(
                  "expected rows of 656 bytes (fp8_ds_mla) or 584 bytes (fp8_ds_v4), got ["),
              std::string::npos)
        << e.what();
  }
}

TEST(SparseMlaPlan, OfOtherSizesIsRefused) {
  LatentBatch batch({}, {{0, 30, 1}, {1, 70, 1}});
  SparseBatch sparse(batch, 128);
  const auto pool = make_thread_pool(2);
  SparseMlaPlanInput good;
  good.num_tokens = 2;
  good.topk = 128;
  good.num_heads = 4;
  good.head_dim_qk = 576;
  good.head_dim_v = 512;
  good.num_workers = 2;
  const auto argument_of = [&](const SparseMlaPlanInput& in, std::size_t missing = 0) {
    const SparseMlaPlan plan = plan_sparse_mla(in);
    Buffer memory(plan.workspace_bytes);
    try {
      sparse_mla_attention(sparse.args(), plan, {memory.data(), plan.workspace_bytes - missing},
                           *pool);
    } catch (const InvalidArgument& e) {
      return e.argument();
    }
    return std::string("none");
  };
  EXPECT_EQ(argument_of(good), "none");
  EXPECT_EQ(argument_of(good, 1), "workspace");
  SparseMlaPlanInput in = good;
  in.topk = 64;
  EXPECT_EQ(argument_of(in), "indices");
  in = good;
  in.num_tokens = 3;
  EXPECT_EQ(argument_of(in), "q");
  in = good;
  in.num_heads = 8;
  EXPECT_EQ(argument_of(in), "q");
  in = good;
  in.head_dim_v = 256;
  EXPECT_EQ(argument_of(in), "out");
  in = good;
  in.num_workers = 1;
  EXPECT_EQ(argument_of(in), "executor");
  in = good;
  in.topk = 0;
  EXPECT_THROW(plan_sparse_mla(in), InvalidArgument);
  in = good;
  in.num_tokens = -1;
  EXPECT_THROW(plan_sparse_mla(in), InvalidArgument);
}

}  // namespace
}  // namespace attend::testing
