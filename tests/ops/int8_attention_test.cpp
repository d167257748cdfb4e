// SPDX-License-Identifier: Apache-2.0
// Attention over int8 queries and keys: the same bits however the work is cut, fused save, smooth
// keys, scales that are NaN. The values themselves are compared with the oracle by the conformance
// cases.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "attend/core/error.h"
#include "attend/ops/int8_attention.h"
#include "attend/ops/int8_cache.h"
#include "attend/oracle/attention.h"
#include "conformance/int8_problem.h"
#include "support/scale.h"

namespace attend {
namespace {

using conformance::AttentionShape;
using conformance::Int8Options;
using conformance::Int8Problem;
using conformance::Rng;
using conformance::Storage;

/// A few requests around the boundaries of pieces.
AttentionShape shape() {
  AttentionShape s;
  s.kv_heads = 2;
  s.group_size = 3;
  s.head_dim = 72;
  s.head_dim_v = 80;
  s.query_lens = {1, 5, 70, 1};
  s.seq_lens = {600, 517, 300, 0};
  s.causal = true;
  return s;
}

Int8Problem make_problem(DType values, bool smooth = false) {
  Rng rng(3);
  Int8Options options;
  options.values = values;
  options.out = DType::f32;
  options.smooth_keys = smooth;
  Int8Problem p(rng, shape(), options);
  p.reset();
  return p;
}

/// Output rows [begin, end), as bytes.
std::vector<float> rows(const TensorView& out, std::int64_t begin, std::int64_t end) {
  std::vector<float> copy;
  for (std::int64_t t = begin; t < end; ++t)
    for (std::int64_t h = 0; h < out.shape[1]; ++h)
      for (std::int64_t d = 0; d < out.shape[2]; ++d)
        copy.push_back(
            out.as<float>()[t * out.strides[0] + h * out.strides[1] + d * out.strides[2]]);
  return copy;
}

class Int8Attention : public ::testing::TestWithParam<std::tuple<IsaLevel, DType>> {
 protected:
  IsaLevel isa() const { return std::get<0>(GetParam()); }
  DType values() const { return std::get<1>(GetParam()); }
};

TEST_P(Int8Attention, ThreadsDoNotChangeBits) {
  Int8Problem p = make_problem(values());
  std::vector<float> first;
  for (const int threads : {1, 2, 7}) {
    p.reset();
    const auto executor = make_thread_pool(threads);
    flash_attn_varlen_int8(p.args(), executor.get(), isa());
    const std::vector<float> out = rows(p.out.view(), 0, p.out.view().shape[0]);
    if (first.empty()) first = out;
    EXPECT_EQ(std::memcmp(first.data(), out.data(), out.size() * sizeof(float)), 0) << threads;
  }
}

TEST_P(Int8Attention, ARequestAloneHasTheBitsThatItHasInABatch) {
  Int8Problem p = make_problem(values(), true);
  const FlashAttnVarlenInt8Args all = p.args();
  flash_attn_varlen_int8(all, nullptr, isa());
  const std::vector<float> batch = rows(p.out.view(), 0, p.out.view().shape[0]);
  const std::vector<std::int32_t> start = p.shape.query_start_loc();
  p.reset();
  for (int r = 0; r < p.shape.num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    // Every token by itself, as decode would have it, with the keys that it may see.
    for (std::int32_t t = start[i]; t < start[i + 1]; t += testing::scaled(1, 9)) {
      const std::int32_t starts[] = {0, 1};
      const std::int32_t keys[] = {std::max(0, p.shape.seq_lens[i] - (start[i + 1] - 1 - t))};
      FlashAttnVarlenInt8Args one = all;
      one.q = all.q.slice(0, t, 1);
      one.q_scale = all.q_scale.slice(1, t, 1);
      one.out = p.out.view().slice(0, t, 1);
      one.lse = {};
      one.k_mean = all.k_mean.slice(0, r, 1);
      one.query_start_loc = {starts, DType::i32, {2}};
      one.seq_lens = {keys, DType::i32, {1}};
      one.block_table = all.block_table.slice(0, r, 1);
      flash_attn_varlen_int8(one, nullptr, isa());
      const std::vector<float> alone = rows(p.out.view(), t, t + 1);
      const float* together = batch.data() + static_cast<std::size_t>(t) * alone.size();
      EXPECT_EQ(std::memcmp(together, alone.data(), alone.size() * sizeof(float)), 0) << t;
    }
  }
}

TEST_P(Int8Attention, ASharedPrefixDoesNotChangeBits) {
  Int8Problem p = make_problem(values());
  // Requests 0 and 1 begin with the same 32 blocks of 16 keys: two pieces.
  auto* table = p.blocks.table.view().as<std::int32_t>();
  for (std::int64_t b = 0; b < 32; ++b)
    table[p.blocks.table.offset({1, b})] = table[p.blocks.table.offset({0, b})];
  const std::vector<std::int32_t> starts = p.shape.query_start_loc();
  const SharedPrefix shared[] = {{0, 2, 512}};
  AttentionPlanInput in;
  in.query_start_loc = starts;
  in.seq_lens = p.shape.seq_lens;
  in.num_q_heads = p.shape.q_heads();
  in.num_kv_heads = p.shape.kv_heads;
  in.head_dim_qk = p.shape.head_dim;
  in.head_dim_v = p.shape.head_dim_v;
  in.num_workers = 2;
  in.isa = isa();
  const auto executor = make_thread_pool(2);
  std::vector<float> flat;
  for (const bool share : {false, true}) {
    if (share) in.shared_prefixes = shared;
    const AttentionPlan plan = plan_attention(in);
    Buffer workspace(plan.workspace_bytes);
    p.reset();
    flash_attn_varlen_int8(p.args(), plan, workspace.workspace(), *executor);
    const std::vector<float> out = rows(p.out.view(), 0, p.out.view().shape[0]);
    if (flat.empty()) flat = out;
    EXPECT_EQ(std::memcmp(flat.data(), out.data(), out.size() * sizeof(float)), 0) << share;
  }
  table[p.blocks.table.offset({1, 3})] = table[p.blocks.table.offset({0, 4})];
  const AttentionPlan plan = plan_attention(in);
  Buffer workspace(plan.workspace_bytes);
  EXPECT_THROW(flash_attn_varlen_int8(p.args(), plan, workspace.workspace(), *executor),
               InvalidArgument);
}

TEST_P(Int8Attention, ANanScaleReachesWhatDependsOnItAndNothingElse) {
  Int8Problem p = make_problem(values());
  FlashAttnVarlenInt8Args a = p.args();
  flash_attn_varlen_int8(a, nullptr, isa());
  const std::vector<float> clean = rows(p.out.view(), 0, p.out.view().shape[0]);
  // Token 3, head 4: its own row only. Key 280 of request 2: rows from position 280 on, kv head 1.
  p.q_scale.set(p.q_scale.offset({4, 3}), NAN);
  p.k_scale.set(p.k_scale.offset({p.blocks.block(2, 280), 1, 280 % p.options.block_size}), NAN);
  p.reset();
  flash_attn_varlen_int8(a, nullptr, isa());
  const std::vector<float> out = rows(p.out.view(), 0, p.out.view().shape[0]);
  const std::int64_t heads = p.shape.q_heads(), dim = p.shape.head_dim_v;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::int64_t token = static_cast<std::int64_t>(i) / (heads * dim);
    const std::int64_t head = static_cast<std::int64_t>(i) / dim % heads;
    const std::int64_t position = 300 - 70 + token - 6;  // of request 2's tokens
    const bool own = token == 3 && head == 4;
    const bool sees_key = token >= 6 && token < 76 && position >= 280 && head >= 3;
    if (own || sees_key) {
      EXPECT_TRUE(std::isnan(out[i])) << token << " " << head;
    } else {
      EXPECT_EQ(std::memcmp(&out[i], &clean[i], sizeof(float)), 0) << token << " " << head;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, Int8Attention,
                         ::testing::Combine(::testing::ValuesIn(available_isa_levels()),
                                            ::testing::Values(DType::i8, DType::f16, DType::bf16)),
                         [](const auto& info) {
                           return std::string(to_string(std::get<0>(info.param))) + "_" +
                                  std::string(to_string(std::get<1>(info.param)));
                         });

// Integer sums are exact, and levels of 16 lanes add the weights up in the same order.
TEST(Int8AttentionLevels, Of16LanesHaveTheSameBits) {
  Rng rng(21);
  for (int i = 0; i < testing::scaled(150, 15); ++i) {
    conformance::ShapeLimits limits;
    limits.products = testing::scaled(20'000'000, 4'000'000);
    Int8Options options = conformance::random_int8_options(rng);
    options.values = DType::i8;
    options.out = DType::f32;
    Int8Problem p(rng, conformance::random_shape(rng, limits), options);
    std::vector<float> first;
    for (const IsaLevel level : available_isa_levels()) {
      if (level < IsaLevel::avx512) continue;
      p.reset();
      flash_attn_varlen_int8(p.args(), nullptr, level);
      const std::vector<float> out = rows(p.out.view(), 0, p.out.view().shape[0]);
      if (first.empty()) first = out;
      ASSERT_EQ(first.size(), out.size());
      ASSERT_TRUE(out.empty() ||
                  std::memcmp(first.data(), out.data(), out.size() * sizeof(float)) == 0)
          << to_string(level) << " " << i << " " << p.describe();
    }
  }
}

PagedAttentionInt8Args paged_args(const Int8Problem& p) {
  const FlashAttnVarlenInt8Args from = p.args();
  PagedAttentionInt8Args a;
  a.q = from.q;
  a.q_scale = from.q_scale.permute({1, 0});
  a.key_cache = p.k.view();
  a.key_scale_cache = p.k_scale.view();
  a.value_cache = p.v.view();
  a.v_scale = from.v_scale;
  a.out = from.out;
  a.query_start_loc = from.query_start_loc;
  a.seq_lens = from.seq_lens;
  a.block_table = from.block_table;
  a.params = from.params;
  return a;
}

/// New rows of decodes: requests with one or a few tokens, blocks of 16.
struct Decode {
  Int8Problem problem;
  Storage key, value, scale;
  std::vector<std::int64_t> slots;

  explicit Decode(DType values) : problem(make(values)) {
    Rng rng(9);
    const AttentionShape& s = problem.shape;
    const std::int64_t tokens = s.query_start_loc().back();
    key = Storage(rng, DType::i8, {tokens, s.kv_heads, s.head_dim});
    value = Storage(rng, values, {tokens, s.kv_heads, s.head_dim_v});
    scale = Storage(rng, DType::f32, {tokens, s.kv_heads});
    key.set_random(rng, 30.0);
    value.set_random(rng, values == DType::i8 ? 30.0 : 1.0);
    scale.set_random(rng, 0.01);
    for (int r = 0; r < s.num_reqs(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      for (int n = 0; n < s.query_lens[i]; ++n) {
        const int position = s.seq_lens[i] - s.query_lens[i] + n;
        slots.push_back(std::int64_t{problem.blocks.block(r, position)} * 16 + position % 16);
      }
    }
    problem.k.freeze();
    problem.v.freeze();
    problem.k_scale.freeze();
  }
  static Int8Problem make(DType values) {
    Rng rng(4);
    AttentionShape s = shape();
    s.query_lens = {1, 3, 2};
    s.seq_lens = {600, 257, 2};
    Int8Options options;
    options.values = values;
    options.out = DType::f32;
    return {rng, s, options};
  }
  PagedAttentionInt8Args args(bool save) const {
    PagedAttentionInt8Args a = paged_args(problem);
    if (save) {
      a.save_key = key.view();
      a.save_value = value.view();
      a.save_key_scale = scale.view();
    }
    return a;
  }
};

TEST(PagedAttentionInt8, FusedSaveGivesTheBitsOfASeparateSave) {
  for (const DType values : {DType::i8, DType::bf16}) {
    Decode d(values);
    const bool level1 = values == DType::i8;
    const auto attend = level1 ? paged_attention_int8 : paged_attention_mix;
    attend(d.args(true), nullptr, std::nullopt);
    const std::vector<float> fused = rows(d.problem.out.view(), 0, 6);
    d.problem.reset();
    for (Storage* s : {&d.problem.k, &d.problem.v, &d.problem.k_scale}) s->reset();
    ReshapeAndCacheInt8Args write;
    write.key = d.key.view();
    write.value = d.value.view();
    write.k_scale = d.scale.view();
    write.key_cache = d.problem.k.view();
    write.value_cache = d.problem.v.view();
    write.key_scale_cache = d.problem.k_scale.view();
    write.slot_mapping = {d.slots.data(), DType::i64, {6}};
    (level1 ? reshape_and_cache_flash_int8 : reshape_and_cache_flash_mix)(write, nullptr);
    attend(d.args(false), nullptr, std::nullopt);
    const std::vector<float> separate = rows(d.problem.out.view(), 0, 6);
    EXPECT_EQ(std::memcmp(fused.data(), separate.data(), fused.size() * sizeof(float)), 0);
  }
}

TEST(PagedAttentionInt8, WhatCannotBeSavedIsRefusedBeforeAnythingIsWritten) {
  Decode d(DType::i8);
  const auto refused = [&](const char* argument, const PagedAttentionInt8Args& a) {
    for (Storage* s : {&d.problem.k, &d.problem.v, &d.problem.k_scale, &d.problem.out}) s->reset();
    try {
      paged_attention_int8(a);
      ADD_FAILURE() << argument << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), argument) << e.what();
      EXPECT_EQ(e.op(), "paged_attention_int8");
    }
    for (Storage* s : {&d.problem.k, &d.problem.v, &d.problem.k_scale, &d.problem.out})
      EXPECT_EQ(s->damage(), "");
  };
  PagedAttentionInt8Args a = d.args(true);
  a.save_value = {};
  refused("save_key", a);
  a = d.args(true);
  a.save_key_scale = a.save_key_scale.slice(0, 0, 5);
  refused("save_key_scale", a);
  a = d.args(true);
  a.save_key.dtype = DType::u8;
  refused("save_key", a);
  a = d.args(true);
  a.save_value = d.problem.v.view().select(0, 0).permute({1, 0, 2}).slice(0, 0, 6);  // the cache
  refused("value_cache", a);
  a = d.args(true);
  const std::int32_t short_lens[] = {600, 2, 2};  // 3 new tokens, 2 keys
  a.seq_lens = {short_lens, DType::i32, {3}};
  refused("seq_lens", a);
  a = d.args(true);
  a.value_cache.dtype = DType::u8;
  refused("value_cache", a);
}

}  // namespace
}  // namespace attend
