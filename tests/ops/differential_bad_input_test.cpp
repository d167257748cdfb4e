// SPDX-License-Identifier: Apache-2.0
// Everything that differential attention must refuse, by name, without touching its outputs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "differential_batch.h"

namespace attend::testing {
namespace {

using A = DifferentialAttentionArgs;
using B = DifferentialBatch;

enum class Kind : std::uint8_t { ragged, paged, v2, maps, fp8 };

B batch_of(Kind kind) {
  DifferentialBatchOptions o;
  o.dtype = DType::f32;
  o.cache = kind == Kind::fp8 ? DType::fp8_e4m3 : DType::f32;
  o.dim = 16;
  if (kind == Kind::ragged) o.block_size = 0;
  if (kind == Kind::v2) o.variant = DifferentialVariant::v2;
  o.maps = kind == Kind::maps;
  B batch(o, {{0, 20, 3}, {1, 5, 2}});
  batch.poison();
  return batch;
}

void expect_untouched(const B& batch) {
  for (const HostTensor* t : {&batch.out, &batch.maps, &batch.lse})
    EXPECT_TRUE(std::ranges::all_of(t->snapshot(), [](unsigned char x) { return x == 0xff; }));
}

/// One way to spoil a valid call, and the argument that the error must name.
struct Spoilt {
  const char* how;
  const char* argument;
  Kind kind;
  std::function<void(A&, B&)> spoil;
};

const float kNan = std::nanf("");
constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNegativeScale[] = {1.0F, -1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F};

std::int32_t& entry(const HostTensor& t, std::size_t i) { return t.as<std::int32_t>()[i]; }

const std::vector<Spoilt> kTensors{
    {"null q", "q", Kind::paged, [](A& a, B&) { a.q.data = nullptr; }},
    {"null k", "k", Kind::paged, [](A& a, B&) { a.k.data = nullptr; }},
    {"null v", "v", Kind::ragged, [](A& a, B&) { a.v.data = nullptr; }},
    {"null out", "out", Kind::paged, [](A& a, B&) { a.out.data = nullptr; }},
    {"dtype of q", "q", Kind::paged, [](A& a, B&) { a.q.dtype = DType::i8; }},
    {"dtype of k", "k", Kind::paged, [](A& a, B&) { a.k.dtype = DType::bf16; }},
    {"int8 keys", "k", Kind::paged, [](A& a, B&) { a.k.dtype = a.v.dtype = DType::i8; }},
    {"dtype of v", "v", Kind::fp8, [](A& a, B&) { a.v.dtype = DType::fp8_e5m2; }},
    {"dtype of out", "out", Kind::paged, [](A& a, B&) { a.out.dtype = DType::bf16; }},
    {"dtype of maps", "maps", Kind::maps, [](A& a, B&) { a.maps.dtype = DType::bf16; }},
    {"dtype of lse", "lse", Kind::paged, [](A& a, B&) { a.lse.dtype = DType::f16; }},
    {"device of q", "q", Kind::paged, [](A& a, B&) { a.q.device.type = DeviceType::cuda; }},
    {"rank of q", "q", Kind::paged, [](A& a, B&) { a.q = a.q.select(0, 0); }},
    {"k without branches", "k", Kind::paged, [](A& a, B&) { a.k = a.k.select(0, 0); }},
    {"v without branches", "v", Kind::paged, [](A& a, B&) { a.v = a.v.select(0, 0); }},
    {"k with branches", "k", Kind::ragged, [](A& a, B& b) { a.k = b.kv; }},
    {"one branch of k", "k", Kind::paged, [](A& a, B&) { a.k = a.k.slice(0, 0, 1); }},
    {"three branches of v", "v", Kind::paged, [](A& a, B&) { a.v.shape[0] = 3; }},
    {"blocks of v", "v", Kind::paged, [](A& a, B&) { a.v.shape[1] -= 1; }},
    {"block size of v", "v", Kind::paged, [](A& a, B&) { a.v.shape[2] = 8; }},
    {"heads of v", "v", Kind::paged, [](A& a, B&) { a.v.shape[3] = 1; }},
    {"head size of k", "k", Kind::paged, [](A& a, B&) { a.k.shape[4] = 8; }},
    {"head size of v", "v", Kind::paged, [](A& a, B&) { a.v.shape[4] = 8; }},
    {"head size of v", "v", Kind::v2, [](A& a, B&) { a.v.shape[3] = 8; }},
    {"block size of 5", "k", Kind::paged, [](A& a, B&) { a.k.shape[2] = a.v.shape[2] = 5; }},
    {"odd q heads", "q", Kind::paged, [](A& a, B&) { a.q = a.q.slice(1, 0, 7); }},
    {"no q heads", "q", Kind::paged, [](A& a, B&) { a.q.shape[1] = 0; }},
    {"odd kv heads", "num_kv_heads", Kind::ragged,
     [](A& a, B&) {
       a.q = a.q.slice(1, 0, 6);
       a.k = a.k.slice(1, 0, 3);
       a.v = a.v.slice(1, 0, 3);
     }},
    {"q heads that kv heads do not divide", "num_q_heads", Kind::paged,
     [](A& a, B&) { a.q = a.q.slice(1, 0, 6); }},
    {"half a pair of q heads to a kv head", "num_q_heads", Kind::v2,
     [](A& a, B&) { a.q = a.q.slice(1, 0, 4); }},
    {"halves in variant v2", "pairing", Kind::v2,
     [](A& a, B&) { a.pairing = HeadPairing::halves; }},
    {"head size not a multiple of 8", "q", Kind::paged,
     [](A& a, B&) { a.q.shape[2] = a.k.shape[4] = a.v.shape[4] = 12; }},
    {"last stride of q", "q", Kind::paged, [](A& a, B&) { a.q.strides[2] = 2; }},
    {"last stride of k", "k", Kind::paged, [](A& a, B&) { a.k.strides[4] = 2; }},
    {"last stride of v", "v", Kind::ragged, [](A& a, B&) { a.v.strides[2] = 0; }},
    {"last stride of out", "out", Kind::paged, [](A& a, B&) { a.out.strides[2] = 2; }},
    {"last stride of maps", "maps", Kind::maps, [](A& a, B&) { a.maps.strides[2] = 2; }},
};

const std::vector<Spoilt> kResults{
    {"neither out nor maps", "out", Kind::paged, [](A& a, B&) { a.out = {}; }},
    {"both out and maps", "out", Kind::paged, [](A& a, B& b) { a.maps = b.maps; }},
    {"heads of out", "out", Kind::paged, [](A& a, B&) { a.out = a.out.slice(1, 0, 4); }},
    {"all heads in out", "out", Kind::v2, [](A& a, B&) { a.out.shape[1] = 8; }},
    {"columns of out", "out", Kind::paged, [](A& a, B&) { a.out.shape[2] = 32; }},
    {"tokens of out", "out", Kind::paged, [](A& a, B&) { a.out.shape[0] = 4; }},
    {"columns of maps", "maps", Kind::maps, [](A& a, B&) { a.maps.shape[2] = 16; }},
    {"heads of maps", "maps", Kind::maps, [](A& a, B&) { a.maps.shape[1] = 4; }},
    {"shape of lse", "lse", Kind::paged, [](A& a, B&) { a.lse.shape[1] = 4; }},
    {"rows of out share memory", "out", Kind::paged, [](A& a, B&) { a.out.strides[0] = 0; }},
    {"heads of maps share memory", "maps", Kind::maps, [](A& a, B&) { a.maps.strides[1] = 0; }},
    {"rows of lse share memory", "lse", Kind::paged, [](A& a, B&) { a.lse.strides[0] = 0; }},
    {"out over q", "out", Kind::paged, [](A& a, B& b) { a.out.data = b.q.view().data; }},
    {"out over k", "out", Kind::paged, [](A& a, B& b) { a.out.data = b.kv.view().data; }},
    {"out over v", "out", Kind::ragged, [](A& a, B&) { a.out.data = const_cast<void*>(a.v.data); }},
    {"maps over q", "maps", Kind::maps,
     [](A& a, B&) { a.q = {static_cast<float*>(a.maps.data) + 8, DType::f32, {5, 8, 16}}; }},
    {"out over the weight", "out", Kind::paged,
     [](A& a, B& b) { a.combine.norm_weight = {b.out.view().data, DType::f32, {32}}; }},
    {"out over token_lambda", "out", Kind::v2,
     [](A& a, B& b) { a.combine.token_lambda = {b.out.view().data, DType::f32, {5, 4}}; }},
    {"lse over out", "lse", Kind::paged, [](A& a, B& b) { a.lse.data = b.out.view().data; }},
    {"lse over maps", "lse", Kind::maps, [](A& a, B& b) { a.lse.data = b.maps.view().data; }},
    {"lse over v", "lse", Kind::paged, [](A& a, B&) { a.lse.data = const_cast<void*>(a.v.data); }},
    {"lse over token_lambda", "lse", Kind::v2,
     [](A& a, B& b) { a.lse.data = b.token_lambda.view().data; }},
};

const std::vector<Spoilt> kCombine{
    {"NaN lambda", "lambda", Kind::paged, [](A& a, B&) { a.combine.lambda = kNan; }},
    {"infinite lambda", "lambda", Kind::ragged, [](A& a, B&) { a.combine.lambda = -kInf; }},
    {"token_lambda in v1", "token_lambda", Kind::paged,
     [](A& a, B& b) { a.combine.token_lambda = b.token_lambda; }},
    {"no token_lambda in v2", "token_lambda", Kind::v2,
     [](A& a, B&) { a.combine.token_lambda = {}; }},
    {"tokens of token_lambda", "token_lambda", Kind::v2,
     [](A& a, B&) { a.combine.token_lambda.shape[0] = 4; }},
    {"a token_lambda for each head", "token_lambda", Kind::v2,
     [](A& a, B& b) { a.combine.token_lambda = b.lse; }},
    {"dtype of token_lambda", "token_lambda", Kind::v2,
     [](A& a, B&) { a.combine.token_lambda.dtype = DType::i32; }},
    {"norm in v2", "norm", Kind::v2, [](A& a, B&) { a.combine.norm = true; }},
    {"weight without norm", "norm_weight", Kind::paged, [](A& a, B&) { a.combine.norm = false; }},
    {"a weight as wide as a head", "norm_weight", Kind::paged,
     [](A& a, B&) { a.combine.norm_weight.shape[0] = 16; }},
    {"rank of the weight", "norm_weight", Kind::paged,
     [](A& a, B& b) { a.combine.norm_weight = {b.norm_weight.view().data, DType::f32, {1, 32}}; }},
    {"dtype of the weight", "norm_weight", Kind::paged,
     [](A& a, B&) { a.combine.norm_weight.dtype = DType::fp8_e4m3; }},
    {"stride of the weight", "norm_weight", Kind::paged,
     [](A& a, B&) { a.combine.norm_weight.strides[0] = 2; }},
    {"eps of 0", "norm_eps", Kind::paged, [](A& a, B&) { a.combine.norm_eps = 0.0F; }},
    {"negative eps", "norm_eps", Kind::paged, [](A& a, B&) { a.combine.norm_eps = -1e-5F; }},
    {"NaN eps", "norm_eps", Kind::paged, [](A& a, B&) { a.combine.norm_eps = kNan; }},
    {"infinite eps", "norm_eps", Kind::paged, [](A& a, B&) { a.combine.norm_eps = kInf; }},
    {"NaN out_scale", "out_scale", Kind::paged, [](A& a, B&) { a.combine.out_scale = kNan; }},
    {"infinite out_scale", "out_scale", Kind::v2, [](A& a, B&) { a.combine.out_scale = kInf; }},
};

const std::vector<Spoilt> kLengths{
    {"no query_start_loc", "query_start_loc", Kind::paged,
     [](A& a, B&) { a.query_start_loc = {}; }},
    {"query_start_loc decreases", "query_start_loc", Kind::paged,
     [](A&, B& b) { entry(b.query_start_loc, 1) = 6; }},
    {"query_start_loc ends before the rows of q", "q", Kind::paged,
     [](A&, B& b) { entry(b.query_start_loc, 2) = 4; }},
    {"both kinds of lengths", "cu_seqlens_kv", Kind::paged,
     [](A& a, B& b) { a.cu_seqlens_kv = b.key_start_loc; }},
    {"neither kind of lengths", "cu_seqlens_kv", Kind::ragged,
     [](A& a, B&) { a.cu_seqlens_kv = {}; }},
    {"cu_seqlens_kv ends beyond the rows of k", "cu_seqlens_kv", Kind::ragged,
     [](A&, B& b) { entry(b.key_start_loc, 2) = 26; }},
    {"negative seq_len", "seq_lens", Kind::paged, [](A&, B& b) { entry(b.seq_lens, 1) = -1; }},
    {"seq_len beyond the table", "seq_lens", Kind::paged,
     [](A&, B& b) { entry(b.seq_lens, 0) = 49; }},
    {"a negative block", "block_table", Kind::paged,
     [](A&, B& b) { entry(b.block_table, 1) = -1; }},
    {"a block beyond the cache", "block_table", Kind::paged,
     [](A& a, B& b) { entry(b.block_table, 0) = static_cast<std::int32_t>(a.k.shape[1]); }},
    {"a block beyond the cache", "block_table", Kind::v2,
     [](A& a, B& b) { entry(b.block_table, 0) = static_cast<std::int32_t>(a.k.shape[0]); }},
    {"scale of 0", "scale", Kind::paged, [](A& a, B&) { a.params.scale = 0.0F; }},
    {"negative softcap", "softcap", Kind::paged, [](A& a, B&) { a.params.softcap = -1.0F; }},
    {"window_left of -2", "window_left", Kind::paged, [](A& a, B&) { a.params.window_left = -2; }},
    {"slopes of pairs", "alibi_slopes", Kind::paged,
     [](A& a, B& b) { a.params.alibi_slopes = {b.q.view().data, DType::f32, {4}}; }},
    {"sinks of pairs", "sinks", Kind::paged,
     [](A& a, B& b) { a.params.sinks = {b.q.view().data, DType::f32, {4}}; }},
    {"descale of plain keys", "k_descale", Kind::paged,
     [](A& a, B& b) { a.k_descale = b.descale; }},
    {"descale of plain queries", "q_descale", Kind::fp8,
     [](A& a, B& b) { a.q_descale = b.descale; }},
    {"a descale for each pair", "v_descale", Kind::fp8,
     [](A& a, B& b) { a.v_descale = {b.descale.view().data, DType::f32, {2, 2}}; }},
    {"a negative descale", "k_descale", Kind::fp8,
     [](A& a, B&) { a.k_descale = {kNegativeScale, DType::f32, {2, 4}}; }},
};

template <typename Call>
void expect_refused(Call&& call, const char* op, const char* argument) {
  try {
    call();
    ADD_FAILURE() << "accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.op(), op) << e.what();
    EXPECT_EQ(e.argument(), argument) << e.what();
  }
}

void expect_all_refused(const std::vector<Spoilt>& list) {
  for (const Spoilt& s : list) {
    SCOPED_TRACE(s.how);
    B batch = batch_of(s.kind);
    A args = batch.args();
    s.spoil(args, batch);
    expect_refused([&] { differential_attention(args); }, "differential_attention", s.argument);
    expect_untouched(batch);
  }
}

TEST(DifferentialBadInput, Tensors) { expect_all_refused(kTensors); }
TEST(DifferentialBadInput, Results) { expect_all_refused(kResults); }
TEST(DifferentialBadInput, LambdaAndNorm) { expect_all_refused(kCombine); }
TEST(DifferentialBadInput, LengthsAndParameters) { expect_all_refused(kLengths); }

TEST(DifferentialBadInput, TheUnspoiltCallsAreAccepted) {
  for (const Kind kind : {Kind::ragged, Kind::paged, Kind::v2, Kind::maps, Kind::fp8}) {
    B batch = batch_of(kind);
    EXPECT_NO_THROW(differential_attention(batch.args()));
    EXPECT_FALSE(has_nan(batch.result()));
    EXPECT_FALSE(has_nan(batch.lse));
  }
}

TEST(DifferentialBadInput, MapsIgnoreWhatFollowsThem) {
  B batch = batch_of(Kind::maps);
  batch.combine.lambda = kNan;
  batch.combine.norm_eps = -1.0F;
  batch.combine.token_lambda = batch.norm_weight;
  EXPECT_NO_THROW(differential_attention(batch.args()));
  EXPECT_FALSE(has_nan(batch.maps));
}

TEST(DifferentialBadInput, FastArithmeticIsRefused) {
  for (const IsaLevel level : available_isa_levels()) {
    DifferentialBatchOptions o;  // bf16, which level amx has fast kernels for
    B batch(o, {{0, 20, 3}});
    batch.poison();
    EXPECT_THROW(differential_attention(batch.args(), nullptr, {level, Arithmetic::fast}),
                 Unsupported);
    expect_untouched(batch);
    const B::Rows exact = batch.run(nullptr, {level, Arithmetic::exact});
    EXPECT_EQ(batch.run(nullptr, level), exact) << to_string(level);
  }
}

TEST(DifferentialBadInput, PlansOfOtherShapes) {
  B batch = batch_of(Kind::paged);
  const auto pool = make_thread_pool(2);
  const AttentionPlan plan = plan_attention(batch.plan_input(2));
  Buffer buffer(plan.workspace_bytes);
  const auto refused = [&](const AttentionPlan& other, Workspace workspace, const char* argument) {
    SCOPED_TRACE(argument);
    const auto call = [&](bool only_validate) {
      expect_refused(
          [&] {
            if (only_validate) {
              validate(batch.args(), other, workspace, *pool);
            } else {
              differential_attention(batch.args(), other, workspace, *pool);
            }
          },
          "differential_attention", argument);
    };
    call(true);
    call(false);
    expect_untouched(batch);
  };
  const auto with = [&](auto change) {
    AttentionPlan other = plan;
    change(other);
    return other;
  };
  const Workspace good = buffer.workspace();
  refused(plan, {buffer.data(), plan.workspace_bytes - 1}, "workspace");
  refused(plan, {nullptr, plan.workspace_bytes}, "workspace");
  refused(with([](AttentionPlan& p) { p.num_workers = 3; }), good, "executor");
  refused(with([](AttentionPlan& p) { p.branches = 1; }), good, "branches");
  refused(with([](AttentionPlan& p) { p.num_q_heads = 4; }), good, "q");
  refused(with([](AttentionPlan& p) { p.num_kv_heads = 4; }), good, "k");
  refused(with([](AttentionPlan& p) { p.head_dim_qk = 32; }), good, "q");
  refused(with([](AttentionPlan& p) { p.head_dim_v = 16; }), good, "v");
  refused(with([](AttentionPlan& p) { p.window_left = 3; }), good, "window_left");
  refused(with([](AttentionPlan& p) { p.query_start_loc = {0, 2, 5}; }), good, "query_start_loc");
  refused(with([](AttentionPlan& p) { p.seq_lens = {19, 6}; }), good, "seq_lens");
  EXPECT_NO_THROW(validate(batch.args(), plan, good, *pool));
  expect_untouched(batch);
}

TEST(DifferentialBadInput, APlanForAttentionIsNotOneForTwoMaps) {
  B batch = batch_of(Kind::paged);
  const auto pool = make_thread_pool(1);
  AttentionPlanInput in = batch.plan_input(1);
  in.branches = 1;
  const AttentionPlan plain = plan_attention(in);
  Buffer buffer(plain.workspace_bytes);
  expect_refused([&] { differential_attention(batch.args(), plain, buffer.workspace(), *pool); },
                 "differential_attention", "branches");
  // Nor the other way round: flash_attn_varlen takes no plan of two branches.
  const AttentionPlan pairs = plan_attention(batch.plan_input(1));
  Buffer large(pairs.workspace_bytes);
  HostTensor k(DType::f32, {25, 2, 16}), v(DType::f32, {25, 2, 32}), out(DType::f32, {5, 8, 32});
  FlashAttnVarlenArgs a;
  a.q = batch.q;
  a.k = k;
  a.v = v;
  a.out = out;
  a.params.causal = true;
  expect_refused([&] { flash_attn_varlen(a, pairs, large.workspace(), *pool); },
                 "flash_attn_varlen", "branches");
}

TEST(DifferentialBadInput, PlanShapes) {
  const auto refused = [](DifferentialVariant variant, std::vector<int> n, const char* argument) {
    AttentionPlanInput in;
    expect_refused([&] { differential_plan_shape(in, variant, n[0], n[1], n[2]); },
                   "differential_attention", argument);
    EXPECT_EQ(in.num_q_heads, 0);
  };
  const auto v1 = DifferentialVariant::v1, v2 = DifferentialVariant::v2;
  refused(v1, {7, 2, 64}, "num_q_heads");
  refused(v1, {0, 2, 64}, "num_q_heads");
  refused(v1, {6, 3, 64}, "num_kv_heads");
  refused(v1, {6, 0, 64}, "num_kv_heads");
  refused(v1, {6, 4, 64}, "num_q_heads");
  refused(v2, {6, 6, 64}, "num_q_heads");
  refused(v2, {7, 1, 64}, "num_q_heads");
  for (const int dim : {0, -8, 12, 264}) refused(v1, {4, 2, dim}, "head_size");
  AttentionPlanInput in;
  differential_plan_shape(in, v1, 40, 20, 64);
  EXPECT_EQ(in.num_q_heads, 40);
  EXPECT_EQ(in.num_kv_heads, 10);
  EXPECT_EQ(in.head_dim_qk, 64);
  EXPECT_EQ(in.head_dim_v, 128);
  EXPECT_EQ(in.branches, 2);
  differential_plan_shape(in, v2, 6, 3, 256);
  EXPECT_EQ(in.num_kv_heads, 3);
  EXPECT_EQ(in.head_dim_v, 256);
  EXPECT_EQ(in.branches, 1);
}

/// Tensors of a call of differential_combine: 3 tokens, 4 heads of 16 elements.
struct Combine {
  Combine() {
    Rng rng(3);
    maps.fill_normal(rng);
    weight.fill_normal(rng);
    out.fill_bytes(0xff);
  }
  DifferentialCombineArgs args() const {
    DifferentialCombineArgs a;
    a.maps = maps;
    a.out = out;
    a.combine.lambda = 0.3F;
    a.combine.norm_weight = weight;
    return a;
  }
  HostTensor maps{DType::f32, {3, 4, 32}}, weight{DType::bf16, {32}}, out{DType::f16, {3, 4, 16}};
};

TEST(DifferentialBadInput, Combine) {
  struct Bad {
    const char* argument;
    std::function<void(DifferentialCombineArgs&)> spoil;
  };
  using C = DifferentialCombineArgs;
  const std::vector<Bad> list{
      {"maps", [](C& a) { a.maps.data = nullptr; }},
      {"maps", [](C& a) { a.maps.dtype = DType::fp8_e4m3; }},
      {"maps", [](C& a) { a.maps = a.maps.select(0, 0); }},
      {"maps", [](C& a) { a.maps = a.maps.slice(1, 0, 3); }},
      {"maps", [](C& a) { a.maps = a.maps.slice(2, 0, 24); }},
      {"maps", [](C& a) { a.maps.shape[2] = 528; }},
      {"maps", [](C& a) { a.maps.strides[2] = 2; }},
      {"out", [](C& a) { a.out.data = nullptr; }},
      {"out", [](C& a) { a.out.dtype = DType::i8; }},
      {"out", [](C& a) { a.out.shape[2] = 32; }},
      {"out", [](C& a) { a.out.shape[1] = 2; }},
      {"out", [](C& a) { a.out.strides[0] = 0; }},
      {"out", [](C& a) { a.out.data = const_cast<void*>(a.maps.data); }},
      {"out", [](C& a) { a.out.data = const_cast<void*>(a.combine.norm_weight.data); }},
      {"pairing",
       [](C& a) {
         a.variant = DifferentialVariant::v2;
         a.pairing = HeadPairing::halves;
       }},
      {"token_lambda", [](C& a) { a.variant = DifferentialVariant::v2; }},
      {"token_lambda", [](C& a) { a.combine.token_lambda = a.maps.select(2, 0).slice(1, 0, 2); }},
      {"lambda", [](C& a) { a.combine.lambda = kNan; }},
      {"norm_weight", [](C& a) { a.combine.norm = false; }},
      {"norm_weight", [](C& a) { a.combine.norm_weight.shape[0] = 16; }},
      {"norm_eps", [](C& a) { a.combine.norm_eps = 0.0F; }},
      {"out_scale", [](C& a) { a.combine.out_scale = kInf; }},
  };
  const Combine problem;
  for (std::size_t i = 0; i < list.size(); ++i) {
    SCOPED_TRACE(i);
    DifferentialCombineArgs a = problem.args();
    list[i].spoil(a);
    expect_refused([&] { differential_combine(a); }, "differential_combine", list[i].argument);
    for (const unsigned char x : problem.out.snapshot()) ASSERT_EQ(x, 0xff);
  }
  EXPECT_NO_THROW(differential_combine(problem.args()));
  EXPECT_FALSE(has_nan(problem.out));
}

}  // namespace
}  // namespace attend::testing
