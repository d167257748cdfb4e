// SPDX-License-Identifier: Apache-2.0
// Everything that flash_attn_with_kvcache must refuse, by name, without touching caches or outputs.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "conformance/storage.h"

namespace attend {
namespace {

using conformance::Rng;
using conformance::Storage;

/// 2 requests of 3 queries and 2 new rows, 4 query heads, 2 kv heads; paged: 6 blocks of 16 tokens,
/// 2 a request; dense: 3 rows of 32 tokens.
struct Problem {
  explicit Problem(bool paged) {
    q = Storage(rng, DType::f32, {2, 3, 4, 16});
    out = Storage(rng, DType::f32, {2, 3, 4, 16});
    lse = Storage(rng, DType::f32, {2, 4, 3});
    k_new = Storage(rng, DType::f32, {2, 2, 2, 16});
    v_new = Storage(rng, DType::f32, {2, 2, 2, 16});
    rotary_cos = Storage(rng, DType::f32, {32, 8});
    rotary_sin = Storage(rng, DType::f32, {32, 8});
    const std::int64_t rows = paged ? 6 : 3, row_size = paged ? 16 : 32;
    k_cache = Storage(rng, DType::f32, {rows, row_size, 2, 16});
    v_cache = Storage(rng, DType::f32, {rows, row_size, 2, 16});
    for (Storage* s : {&q, &k_new, &v_new, &rotary_cos, &rotary_sin, &k_cache, &v_cache}) {
      s->set_random(rng, 1.0);
    }
    args.q = q.view();
    args.k_cache = k_cache.view();
    args.v_cache = v_cache.view();
    args.k_new = k_new.view();
    args.v_new = v_new.view();
    args.out = out.view();
    args.lse = lse.view();
    args.rotary_cos = rotary_cos.view();
    args.rotary_sin = rotary_sin.view();
    args.cache_seqlens = {seqlens.data(), DType::i32, {2}};
    if (paged) {
      args.block_table = {table.data(), DType::i32, {2, 2}};
    } else {
      args.cache_batch_idx = {batch_idx.data(), DType::i32, {2}};
      args.cache_leftpad = {leftpad.data(), DType::i32, {2}};
    }
    for (Storage* s : {&out, &lse, &k_cache, &v_cache}) {
      s->freeze();
      s->reset();
    }
  }

  Rng rng{3};
  Storage q, out, lse, k_new, v_new, k_cache, v_cache, rotary_cos, rotary_sin;
  std::vector<std::int32_t> seqlens{20, 5}, table{4, 1, 0, -7}, batch_idx{2, 0}, leftpad{3, 0};
  FlashAttnWithKvCacheArgs args;
};

/// One way to spoil a valid call, and the argument that the error must name.
struct Spoilt {
  const char* how;
  const char* argument;
  bool paged;
  std::function<void(FlashAttnWithKvCacheArgs&, Problem&)> spoil;
};

using A = FlashAttnWithKvCacheArgs;
using P = Problem;
constexpr bool kPaged = true, kDense = false;

const std::vector<Spoilt> kTensors{
    {"null q", "q", kDense, [](A& a, P&) { a.q.data = nullptr; }},
    {"null k_cache", "k_cache", kDense, [](A& a, P&) { a.k_cache.data = nullptr; }},
    {"null out", "out", kPaged, [](A& a, P&) { a.out.data = nullptr; }},
    {"rank of q", "q", kDense, [](A& a, P&) { a.q = a.q.select(0, 0); }},
    {"rank of v_cache", "v_cache", kDense, [](A& a, P&) { a.v_cache = a.v_cache.select(0, 0); }},
    {"dtype of k_cache", "k_cache", kDense, [](A& a, P&) { a.k_cache.dtype = DType::bf16; }},
    {"device of v_cache", "v_cache", kDense,
     [](A& a, P&) { a.v_cache.device.type = DeviceType::cuda; }},
    {"heads not divisible", "q", kDense, [](A& a, P&) { a.q = a.q.slice(2, 0, 3); }},
    {"head_dim", "q", kDense, [](A& a, P&) { a.q.shape[3] = 12; }},
    {"batch of out", "out", kDense, [](A& a, P&) { a.out.shape[0] = 1; }},
    {"lse as [B, Sq, Hq]", "lse", kDense, [](A& a, P&) { a.lse = a.lse.permute({0, 2, 1}); }},
    {"last stride of k_cache", "k_cache", kPaged, [](A& a, P&) { a.k_cache.strides[3] = 2; }},
    {"k_cache rows share memory", "k_cache", kDense, [](A& a, P&) { a.k_cache.strides[0] = 0; }},
    {"block size of 12", "k_cache", kPaged,
     [](A& a, P&) { a.k_cache.shape[1] = a.v_cache.shape[1] = 12; }},
    {"k_new alone", "v_new", kDense, [](A& a, P&) { a.v_new = {}; }},
    {"v_new alone", "v_new", kDense, [](A& a, P&) { a.k_new = {}; }},
    {"batch of k_new", "k_new", kDense, [](A& a, P&) { a.k_new.shape[0] = 1; }},
    {"heads of k_new", "k_new", kDense, [](A& a, P&) { a.k_new = a.k_new.slice(2, 0, 1); }},
    {"rows of v_new", "v_new", kDense, [](A& a, P&) { a.v_new.shape[1] = 1; }},
    {"dtype of v_new", "v_new", kDense, [](A& a, P&) { a.v_new.dtype = DType::f16; }},
    {"last stride of k_new", "k_new", kDense, [](A& a, P&) { a.k_new.strides[3] = 2; }},
    {"out over q", "out", kDense, [](A& a, P& p) { a.out.data = p.q.view().data; }},
    {"out over k_cache", "out", kDense, [](A& a, P& p) { a.out.data = p.k_cache.view().data; }},
    {"out over v_new", "out", kDense, [](A& a, P& p) { a.out.data = p.v_new.view().data; }},
    {"k_cache over k_new", "k_cache", kPaged,
     [](A& a, P& p) { a.k_new.data = p.k_cache.view().data; }},
    {"caches are one", "k_cache", kPaged,
     [](A& a, P& p) { a.v_cache.data = p.k_cache.view().data; }},
    {"lse over v_cache", "lse", kPaged, [](A& a, P& p) { a.lse.data = p.v_cache.view().data; }},
};

const std::vector<Spoilt> kIndices{
    {"number of cache_seqlens", "cache_seqlens", kDense,
     [](A& a, P&) { a.cache_seqlens.shape[0] = 1; }},
    {"negative length", "cache_seqlens", kDense, [](A&, P& p) { p.seqlens[1] = -1; }},
    {"append beyond the dense cache", "cache_seqlens", kDense, [](A&, P& p) { p.seqlens[0] = 31; }},
    {"append beyond the block table", "cache_seqlens", kPaged, [](A&, P& p) { p.seqlens[0] = 31; }},
    {"append to a whole cache", "cache_seqlens", kDense, [](A& a, P&) { a.cache_seqlens = {}; }},
    {"no lengths for a paged cache", "cache_seqlens", kPaged,
     [](A& a, P&) { a.cache_seqlens = {}; }},
    {"largest length", "cache_seqlens", kPaged,
     [](A&, P& p) { p.seqlens[0] = std::numeric_limits<std::int32_t>::max(); }},
    {"negative leftpad", "cache_leftpad", kDense, [](A&, P& p) { p.leftpad[0] = -1; }},
    {"leftpad beyond the length", "cache_leftpad", kDense, [](A&, P& p) { p.leftpad[1] = 6; }},
    {"negative batch index", "cache_batch_idx", kDense, [](A&, P& p) { p.batch_idx[0] = -1; }},
    {"batch index beyond the cache", "cache_batch_idx", kDense,
     [](A&, P& p) { p.batch_idx[1] = 3; }},
    {"two requests append to one row", "cache_batch_idx", kDense,
     [](A&, P& p) { p.batch_idx[1] = 2; }},
    {"batch index with a block table", "cache_batch_idx", kPaged,
     [](A& a, P& p) { a.cache_batch_idx = {p.batch_idx.data(), DType::i32, {2}}; }},
    {"leftpad with a block table", "cache_leftpad", kPaged,
     [](A& a, P& p) { a.cache_leftpad = {p.leftpad.data(), DType::i32, {2}}; }},
    {"fewer cache rows than requests", "k_cache", kDense,
     [](A& a, P&) {
       a.cache_batch_idx = {};
       a.k_cache = a.k_cache.slice(0, 0, 1);
       a.v_cache = a.v_cache.slice(0, 0, 1);
     }},
    {"rows of the block table", "block_table", kPaged,
     [](A& a, P&) { a.block_table.shape[0] = 1; }},
    {"block id in use", "block_table", kPaged, [](A&, P& p) { p.table[0] = 6; }},
    {"block id of the appended rows", "block_table", kPaged, [](A&, P& p) { p.seqlens[1] = 15; }},
};

const std::vector<Spoilt> kParams{
    {"rotary_cos alone", "rotary_sin", kDense, [](A& a, P&) { a.rotary_sin = {}; }},
    {"rotary without new keys", "rotary_cos", kDense,
     [](A& a, P&) {
       a.k_new = {};
       a.v_new = {};
     }},
    {"rotary_dim of 8", "rotary_cos", kDense,
     [](A& a, P&) { a.rotary_cos.shape[1] = a.rotary_sin.shape[1] = 4; }},
    {"rotary_dim beyond head_dim", "rotary_cos", kDense,
     [](A& a, P&) { a.rotary_cos.shape[1] = a.rotary_sin.shape[1] = 16; }},
    {"shape of rotary_sin", "rotary_sin", kDense, [](A& a, P&) { a.rotary_sin.shape[0] = 31; }},
    {"dtype of rotary_cos", "rotary_cos", kDense,
     [](A& a, P&) { a.rotary_cos.dtype = DType::bf16; }},
    {"too few rotary rows", "rotary_cos", kDense,
     [](A& a, P&) { a.rotary_cos.shape[0] = a.rotary_sin.shape[0] = 22; }},
    {"NaN scale", "scale", kDense, [](A& a, P&) { a.params.scale = std::nanf(""); }},
    {"negative softcap", "softcap", kPaged, [](A& a, P&) { a.params.softcap = -1.0F; }},
    {"window_left of -2", "window_left", kDense, [](A& a, P&) { a.params.window_left = -2; }},
    {"number of slopes", "alibi_slopes", kDense,
     [](A& a, P& p) { a.params.alibi_slopes = {p.q.view().data, DType::f32, {3}}; }},
};

void expect_refused(const std::vector<Spoilt>& list) {
  for (const Spoilt& s : list) {
    SCOPED_TRACE(s.how);
    Problem problem(s.paged);
    s.spoil(problem.args, problem);
    try {
      flash_attn_with_kvcache(problem.args);
      ADD_FAILURE() << "accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "flash_attn_with_kvcache") << e.what();
      EXPECT_EQ(e.argument(), s.argument) << e.what();
    }
    for (const Storage* written :
         {&problem.out, &problem.lse, &problem.k_cache, &problem.v_cache}) {
      EXPECT_EQ(written->damage(), "");
    }
  }
}

TEST(FlashAttnWithKvCacheBadInput, Tensors) { expect_refused(kTensors); }
TEST(FlashAttnWithKvCacheBadInput, Indices) { expect_refused(kIndices); }
TEST(FlashAttnWithKvCacheBadInput, Parameters) { expect_refused(kParams); }

TEST(FlashAttnWithKvCacheBadInput, TheUnspoiltProblemsAreAccepted) {
  for (const bool paged : {kPaged, kDense}) {
    Problem problem(paged);
    EXPECT_NO_THROW(flash_attn_with_kvcache(problem.args));
    EXPECT_NE(problem.out.damage(), "");
    EXPECT_NE(problem.k_cache.damage(), "");
  }
}

TEST(FlashAttnWithKvCache, AppendsIntoPlanesThatInterleave) {
  // One block holds its keys, then its values: the planes' byte ranges meet, their bytes do not.
  Problem problem(kPaged);
  Storage joint(problem.rng, DType::f32, {6, 2, 16, 2, 16});
  joint.set_random(problem.rng, 1.0);
  problem.args.k_cache = joint.view().select(1, 0);
  problem.args.v_cache = joint.view().select(1, 1);
  EXPECT_NO_THROW(flash_attn_with_kvcache(problem.args));
}

}  // namespace
}  // namespace attend
