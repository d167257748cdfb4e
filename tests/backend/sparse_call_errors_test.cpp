// SPDX-License-Identifier: Apache-2.0
// Whatever is wrong with a layer of FLASHMLA_SPARSE, its batch or its call, the error names it and
// nothing is written.
#include <gmock/gmock.h>

#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "sparse_layer.h"

namespace attend::testing {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

/// "op argument" of the InvalidArgument that `call` throws.
template <typename Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const InvalidArgument& e) {
    return e.op() + " " + e.argument();
  }
  return "accepted";
}

template <typename Config>
struct BadConfig {
  const char* argument;
  std::function<void(Config&)> change;
};

TEST(SparseBadBuilder, NamesTheField) {
  const auto executor = make_thread_pool(1);
  const BuilderConfig good = SparseLayer({}, *executor).builder_config();
  const BadConfig<BuilderConfig> bad[] = {
      {"mla", [](auto& c) { c.mla.reset(); }},
      {"sparse", [](auto& c) { c.sparse.reset(); }},
      {"mla.dtype", [](auto& c) { c.mla->dtype = DType::f16; }},
      {"kv_lora_rank", [](auto& c) { c.mla->dims = {448, 32, 128, 24}; }},
      {"qk_nope_head_dim", [](auto& c) { c.mla->dims.qk_nope_head_dim = 12; }},
      {"num_q_heads", [](auto& c) { c.num_q_heads = 0; }},
      {"num_kv_heads", [](auto& c) { c.cache.num_kv_heads = 2; }},
      {"cache.format", [](auto& c) { c.cache.format = KvFormat::int8_level1; }},
      {"block_size", [](auto& c) { c.cache.block_size = 16; }},
      {"attn_type", [](auto& c) { c.attn_type = AttentionType::encoder; }},
      {"window_left", [](auto& c) { c.window_left = 3; }},
      {"max_num_splits", [](auto& c) { c.max_num_splits = 2; }},
      {"num_workers", [](auto& c) { c.num_workers = 0; }},
      {"mla.max_model_len", [](auto& c) { c.mla->max_model_len = 0; }},
      {"mla.prefill_backend", [](auto& c) { c.mla->prefill_backend = "FLASH_ATTN"; }},
      {"sparse.topk", [](auto& c) { c.sparse->topk = 0; }},
      {"sparse.topk", [](auto& c) { c.sparse->topk = -5; }},
      {"sparse.max_num_batched_tokens", [](auto& c) { c.sparse->max_num_batched_tokens = 0; }},
      {"sparse.num_processors", [](auto& c) { c.sparse->num_processors = -1; }},
      {"sparse.dcp_world_size", [](auto& c) { c.sparse->dcp_world_size = 0; }},
      {"sparse.dcp_rank", [](auto& c) { c.sparse->dcp_rank = 1; }},
      {"sparse.dcp_interleave", [](auto& c) { c.sparse->dcp_interleave = 3; }},
      {"sparse.strategy",
       [](auto& c) {
         c.sparse->dcp_world_size = 2;
         c.sparse->strategy = SparseStrategy::separate;
       }},
  };
  for (const auto& b : bad) {
    BuilderConfig c = good;
    b.change(c);
    EXPECT_THAT(refusal([&] { (void)find_backend("FLASHMLA_SPARSE").make_builder(c); }),
                EndsWith(std::string(" ") + b.argument));
  }
}

TEST(SparseBadImpl, NamesTheField) {
  const auto executor = make_thread_pool(1);
  const ImplConfig good = SparseLayer({}, *executor).impl_config();
  const BadConfig<ImplConfig> bad[] = {
      {"mla", [](auto& c) { c.mla.reset(); }},
      {"dtype", [](auto& c) { c.dtype = DType::f32; }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "fp8"; }},
      {"softcap", [](auto& c) { c.softcap = 30.0F; }},
      {"sliding_window", [](auto& c) { c.sliding_window = 128; }},
      {"alibi_slopes", [](auto& c) { c.alibi_slopes = {1, 1, 1}; }},
      {"sinks", [](auto& c) { c.sinks = {1, 1, 1}; }},
      {"k_scale", [](auto& c) { c.k_scale = {1}; }},
      {"shares_kv_cache", [](auto& c) { c.shares_kv_cache = true; }},
      {"scale", [](auto& c) { c.scale = 0.0F; }},
      {"mla.prefill_backend", [](auto& c) { c.mla->prefill_backend = "ROCM_AITER_FA"; }},
  };
  for (const auto& b : bad) {
    ImplConfig c = good;
    b.change(c);
    EXPECT_THAT(refusal([&] { (void)find_backend("FLASHMLA_SPARSE").make_impl(c); }),
                EndsWith(std::string(" ") + b.argument));
  }
}

TEST(SparseBadBatch, NamesTheField) {
  const auto executor = make_thread_pool(1);
  SparseLayer layer({}, *executor);
  const SparseStep step = layer.prepare({{0, 40, 1}, {1, 0, 20}});
  const BadConfig<CommonMetadata> bad[] = {
      {"causal", [](auto& m) { m.causal = false; }},
      {"request_causal", [](auto& m) { m.request_causal = {1, 0}; }},
      {"slot_mapping", [](auto& m) { m.slot_mapping[3] = 1 << 20; }},
      {"block_table", [](auto& m) { m.block_table.shape[0] = 1; }},
      {"num_tokens",
       [](auto& m) {
         m.query_start_loc[2] = m.num_tokens = m.max_query_len = 3000;
         m.seq_lens[1] = m.max_seq_len = 2999;
         m.block_table.shape[1] = 60;
         m.slot_mapping.clear();
       }},
  };
  for (const auto& b : bad) {
    CommonMetadata m = step.batch;
    b.change(m);
    EXPECT_THAT(refusal([&] { (void)layer.builder->build(0, m); }),
                EndsWith(std::string(" ") + b.argument));
  }
}

struct BadCall {
  const char* argument;
  std::function<void(ForwardArgs&, SparseStep&)> change;
};

TEST(SparseBadCall, NamesTheArgumentAndWritesNothing) {
  using A = ForwardArgs;
  const BadCall bad[] = {
      {"query", [](A& a, auto&) { a.query.dtype = DType::f16; }},
      {"query", [](A& a, auto&) { a.query.shape[0] -= 1; }},
      {"key", [](A& a, auto&) { a.key = a.query; }},
      {"kv_c", [](A& a, auto&) { a.kv_c.shape[1] = 448; }},
      {"k_pe", [](A& a, auto&) { a.k_pe = {}; }},
      {"topk_indices", [](A& a, auto&) { a.topk_indices = {}; }},
      {"topk_indices", [](A& a, auto&) { a.topk_indices.dtype = DType::i64; }},
      {"topk_indices", [](A& a, auto&) { a.topk_indices.shape[1] -= 1; }},
      {"topk_indices", [](A& a, auto&) { a.topk_indices.shape[0] -= 1; }},
      {"topk_indices", [](A& a, auto&) { a.topk_indices.strides[1] = 2; }},
      {"topk_indices", [](A& a, auto&) { a.topk_indices = a.topk_indices.select(0, 0); }},
      {"kv_cache", [](A& a, auto&) { a.kv_cache.dtype = DType::bf16; }},
      {"kv_cache", [](A& a, auto&) { a.kv_cache.shape[2] = 576; }},
      {"kv_cache", [](A& a, auto&) { a.kv_cache.shape[1] = 32; }},
      {"kv_cache", [](A& a, auto&) { a.kv_cache.shape[0] = 60; }},
      {"kv_scale_cache", [](A& a, auto&) { a.kv_scale_cache = a.lse; }},
      {"output", [](A& a, auto&) { a.output.dtype = DType::f16; }},
      {"output", [](A& a, auto&) { a.output.data = a.kv_cache.data; }},
      {"output", [](A& a, auto&) { a.output.data = const_cast<void*>(a.topk_indices.data); }},
      {"lse", [](A& a, auto&) { a.lse.shape[1] = 2; }},
      {"output_scale",
       [](A& a, auto&) {
         a.output.dtype = DType::fp8_e4m3;
         a.output_scale = 1.0F;
       }},
      {"block_table",
       [](A&, SparseStep& s) { s.block_table.template as<std::int32_t>()[0] = 1 << 20; }},
      {"block_table", [](A&, SparseStep& s) { s.block_table.template as<std::int32_t>()[0] = -1; }},
      {"workspace", [](A& a, auto&) { a.workspace.size -= 1; }},
      {"workspace", [](A& a, auto&) { a.workspace.data = nullptr; }},
  };
  const auto executor = make_thread_pool(2);
  for (const auto& b : bad) {
    SparseLayer layer({}, *executor);
    SparseStep step = layer.prepare({{0, 40, 1}, {1, 0, 200}});
    step.args.workspace.size = step.metadata->workspace_bytes();
    ForwardArgs args = step.args;
    b.change(args, step);
    const auto output = layer.output->snapshot(), lse = layer.lse->snapshot(),
               cache = layer.cache.snapshot();
    EXPECT_EQ(refusal([&] { layer.impl->forward(args, step.metadata.get()); }),
              std::string("FLASHMLA_SPARSE.forward ") + b.argument);
    EXPECT_EQ(layer.output->snapshot(), output);
    EXPECT_EQ(layer.lse->snapshot(), lse);
    EXPECT_EQ(layer.cache.snapshot(), cache);
  }
}

TEST(SparseBadCall, OfOtherBytesATokenNamesTheFormats) {
  const auto executor = make_thread_pool(1);
  SparseLayer layer({}, *executor);
  const SparseStep step = layer.prepare({{0, 0, 3}});
  ForwardArgs args = step.args;
  args.kv_cache.shape[2] = 584;
  try {
    layer.impl->forward(args, step.metadata.get());
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_THAT(e.what(), HasSubstr("fp8_ds_mla, u8 rows of 656; bf16, rows of 576"));
  }
}

TEST(SparseBadCall, MetadataOfOtherLayers) {
  const auto executor = make_thread_pool(1), two = make_thread_pool(2);
  SparseLayer layer({}, *executor);
  SparseSetup plain;
  plain.kv_cache_dtype = "auto";
  SparseLayer other(plain, *executor);
  const SparseStep step = layer.prepare({{0, 0, 3}});
  const auto foreign = other.prepare({{0, 0, 3}}).metadata;
  EXPECT_THAT(refusal([&] { layer.impl->forward(step.args, foreign.get()); }),
              EndsWith(" metadata"));
  ForwardArgs args = step.args;
  args.executor = two.get();
  EXPECT_THAT(refusal([&] { layer.impl->forward(args, step.metadata.get()); }),
              EndsWith(" executor"));
  MlaLayer dense({}, *executor);
  const auto dense_metadata = dense.prepare({{0, 0, 3}}).metadata;
  EXPECT_THAT(refusal([&] { layer.impl->forward(step.args, dense_metadata.get()); }),
              EndsWith(" metadata"));
}

}  // namespace
}  // namespace attend::testing
