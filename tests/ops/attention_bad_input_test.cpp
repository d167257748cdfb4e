// SPDX-License-Identifier: Apache-2.0
// Everything that flash_attn_varlen must refuse, by name, without touching its outputs.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "attend/core/error.h"
#include "attend/ops/attention.h"
#include "conformance/varlen_problem.h"

namespace attend {
namespace {

using conformance::AttentionShape;
using conformance::KvStorage;
using conformance::Rng;
using conformance::VarlenOptions;
using conformance::VarlenProblem;

VarlenProblem small_problem(KvStorage kv) {
  Rng rng(5);
  AttentionShape shape;
  shape.kv_heads = 2;
  shape.group_size = 2;
  shape.head_dim = 16;
  shape.head_dim_v = 24;
  shape.query_lens = {3, 2};
  shape.seq_lens = {20, 5};
  shape.causal = true;
  VarlenOptions options;
  options.kv = kv;
  VarlenProblem problem(rng, shape, options);
  problem.reset();
  return problem;
}

template <typename View>
View misaligned(View t) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(t.data)>>,
                                  const std::byte, std::byte>;
  t.data = static_cast<Byte*>(t.data) + 1;
  return t;
}

std::int32_t& entry(const conformance::Storage& s, std::int64_t i) {
  return s.view().as<std::int32_t>()[i];
}

/// One way to spoil a valid call, and the argument that the error must name.
struct Spoilt {
  const char* how;
  const char* argument;
  KvStorage kv;
  std::function<void(FlashAttnVarlenArgs&, VarlenProblem&)> spoil;
};

using A = FlashAttnVarlenArgs;
using P = VarlenProblem;
constexpr auto kRagged = KvStorage::ragged;
constexpr auto kPaged = KvStorage::paged_nhd;
const float kNan = std::nanf("");
constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNanSinks[] = {0.0F, 1.0F, std::nanf(""), 1.0F};
constexpr float kInfiniteSinks[] = {0.0F, 1.0F, 2.0F, kInf};

const std::vector<Spoilt> kTensors{
    {"null q", "q", kRagged, [](A& a, P&) { a.q.data = nullptr; }},
    {"null k", "k", kRagged, [](A& a, P&) { a.k.data = nullptr; }},
    {"null v", "v", kPaged, [](A& a, P&) { a.v.data = nullptr; }},
    {"null out", "out", kPaged, [](A& a, P&) { a.out.data = nullptr; }},
    {"misaligned q", "q", kRagged, [](A& a, P&) { a.q = misaligned(a.q); }},
    {"misaligned k", "k", kPaged, [](A& a, P&) { a.k = misaligned(a.k); }},
    {"misaligned out", "out", kRagged, [](A& a, P&) { a.out = misaligned(a.out); }},
    {"misaligned lse", "lse", kRagged, [](A& a, P&) { a.lse = misaligned(a.lse); }},
    {"dtype of q", "q", kRagged, [](A& a, P&) { a.q.dtype = DType::i8; }},
    {"dtype of k", "k", kRagged, [](A& a, P&) { a.k.dtype = DType::bf16; }},
    {"dtype of v", "v", kRagged, [](A& a, P&) { a.v.dtype = DType::f16; }},
    {"dtype of out", "out", kRagged, [](A& a, P&) { a.out.dtype = DType::bf16; }},
    {"dtype of lse", "lse", kRagged, [](A& a, P&) { a.lse.dtype = DType::f16; }},
    {"device of q", "q", kRagged, [](A& a, P&) { a.q.device.type = DeviceType::cuda; }},
    {"device of out", "out", kRagged, [](A& a, P&) { a.out.device.type = DeviceType::rocm; }},
    {"rank of q", "q", kRagged, [](A& a, P&) { a.q = a.q.select(0, 0); }},
    {"rank of k", "k", kPaged, [](A& a, P&) { a.k = a.k.select(0, 0); }},
    {"rank of lse", "lse", kRagged, [](A& a, P&) { a.lse = a.lse.select(0, 0); }},
    {"negative size", "q", kRagged, [](A& a, P&) { a.q.shape[0] = -1; }},
    {"heads of q not divisible", "q", kRagged, [](A& a, P&) { a.q = a.q.slice(1, 0, 3); }},
    {"no kv heads", "k", kRagged, [](A& a, P&) { a.k.shape[1] = 0; }},
    {"heads of v", "v", kRagged, [](A& a, P&) { a.v = a.v.slice(1, 0, 1); }},
    {"rows of v", "v", kRagged, [](A& a, P&) { a.v.shape[0] -= 1; }},
    {"head_dim not a multiple of 8", "q", kRagged, [](A& a, P&) { a.q.shape[2] = 12; }},
    {"head_dim of 584", "q", kRagged, [](A& a, P&) { a.q.shape[2] = 584; }},
    {"head_dim of 0", "q", kRagged, [](A& a, P&) { a.q.shape[2] = 0; }},
    {"head_dim of k", "k", kRagged, [](A& a, P&) { a.k.shape[2] = 8; }},
    {"head_dim_v not a multiple of 8", "v", kRagged, [](A& a, P&) { a.v.shape[2] = 20; }},
    {"head_dim of out", "out", kRagged, [](A& a, P&) { a.out.shape[2] = 16; }},
    {"tokens of out", "out", kRagged, [](A& a, P&) { a.out.shape[0] = 4; }},
    {"shape of lse", "lse", kRagged, [](A& a, P&) { a.lse.shape[1] = 3; }},
    {"last stride of q", "q", kRagged, [](A& a, P&) { a.q.strides[2] = 2; }},
    {"last stride of k", "k", kRagged, [](A& a, P&) { a.k.strides[2] = 2; }},
    {"last stride of v", "v", kPaged, [](A& a, P&) { a.v.strides[3] = 0; }},
    {"last stride of out", "out", kRagged, [](A& a, P&) { a.out.strides[2] = 2; }},
    {"rows of out share memory", "out", kRagged, [](A& a, P&) { a.out.strides[0] = 0; }},
    {"rows of lse share memory", "lse", kRagged, [](A& a, P&) { a.lse.strides[1] = 0; }},
    {"block size of 5", "k", kPaged, [](A& a, P&) { a.k.shape[1] = a.v.shape[1] = 5; }},
    {"out over q", "out", kRagged, [](A& a, P& p) { a.out.data = p.q.view().as<float>() + 8; }},
    {"out over k", "out", kRagged, [](A& a, P& p) { a.out.data = p.k.view().data; }},
    {"out over v", "out", kPaged, [](A& a, P& p) { a.out.data = p.v.view().data; }},
    {"lse over out", "lse", kRagged, [](A& a, P& p) { a.lse.data = p.out.view().data; }},
    {"lse over v", "lse", kRagged, [](A& a, P& p) { a.lse.data = p.v.view().data; }},
};

const std::vector<Spoilt> kLengths{
    {"no query_start_loc", "query_start_loc", kRagged, [](A& a, P&) { a.query_start_loc = {}; }},
    {"query_start_loc does not start at 0", "query_start_loc", kRagged,
     [](A&, P& p) { entry(p.query_start_loc, 0) = 1; }},
    {"query_start_loc decreases", "query_start_loc", kRagged,
     [](A&, P& p) { entry(p.query_start_loc, 1) = 6; }},
    {"query_start_loc ends before the rows of q", "q", kRagged,
     [](A&, P& p) { entry(p.query_start_loc, 2) = 4; }},
    {"query_start_loc ends beyond the rows of q", "q", kRagged,
     [](A&, P& p) { entry(p.query_start_loc, 2) = 6; }},
    {"dtype of query_start_loc", "query_start_loc", kRagged,
     [](A& a, P&) { a.query_start_loc.dtype = DType::i64; }},
    {"strided query_start_loc", "query_start_loc", kRagged,
     [](A& a, P&) { a.query_start_loc.strides[0] = 2; }},
    {"neither cu_seqlens_kv nor seq_lens", "cu_seqlens_kv", kRagged,
     [](A& a, P&) { a.cu_seqlens_kv = {}; }},
    {"both cu_seqlens_kv and seq_lens", "cu_seqlens_kv", kPaged,
     [](A& a, P& p) { a.cu_seqlens_kv = p.query_start_loc.view(); }},
    {"seq_lens without block_table", "block_table", kPaged,
     [](A& a, P& p) {
       a.block_table = {};
       a.k = p.k.view().select(0, 0);
       a.v = p.v.view().select(0, 0);
     }},
    {"length of cu_seqlens_kv", "cu_seqlens_kv", kRagged,
     [](A& a, P&) { a.cu_seqlens_kv.shape[0] = 2; }},
    {"cu_seqlens_kv does not start at 0", "cu_seqlens_kv", kRagged,
     [](A&, P& p) { entry(p.cu_seqlens_kv, 0) = 1; }},
    {"cu_seqlens_kv decreases", "cu_seqlens_kv", kRagged,
     [](A&, P& p) { entry(p.cu_seqlens_kv, 1) = 26; }},
    {"cu_seqlens_kv ends beyond the rows of k", "cu_seqlens_kv", kRagged,
     [](A&, P& p) { entry(p.cu_seqlens_kv, 2) = 26; }},
    {"number of seq_lens", "seq_lens", kPaged, [](A& a, P&) { a.seq_lens.shape[0] = 1; }},
    {"negative seq_len", "seq_lens", kPaged, [](A&, P& p) { entry(p.seq_lens, 1) = -1; }},
    {"seq_len beyond the block table", "seq_lens", kPaged,
     [](A& a, P& p) {
       entry(p.seq_lens, 0) = static_cast<std::int32_t>(16 * a.block_table.shape[1]) + 1;
     }},
    {"largest seq_len", "seq_lens", kPaged,
     [](A&, P& p) { entry(p.seq_lens, 0) = std::numeric_limits<std::int32_t>::max(); }},
    {"rows of the block table", "block_table", kPaged,
     [](A& a, P&) { a.block_table.shape[0] = 1; }},
    {"dtype of the block table", "block_table", kPaged,
     [](A& a, P&) { a.block_table.dtype = DType::i64; }},
    {"last stride of the block table", "block_table", kPaged,
     [](A& a, P&) { a.block_table.strides[1] = 2; }},
    {"negative block id in use", "block_table", kPaged,
     [](A&, P& p) { entry(p.block_table, p.block_table.offset({0, 1})) = -1; }},
    {"block id beyond the cache", "block_table", kPaged,
     [](A& a, P& p) {
       entry(p.block_table, p.block_table.offset({1, 0})) = static_cast<std::int32_t>(a.k.shape[0]);
     }},
};

const std::vector<Spoilt> kParams{
    {"NaN scale", "scale", kRagged, [](A& a, P&) { a.params.scale = kNan; }},
    {"infinite scale", "scale", kRagged, [](A& a, P&) { a.params.scale = kInf; }},
    {"scale of 0", "scale", kRagged, [](A& a, P&) { a.params.scale = 0.0F; }},
    {"negative scale", "scale", kRagged, [](A& a, P&) { a.params.scale = -0.5F; }},
    {"negative softcap", "softcap", kRagged, [](A& a, P&) { a.params.softcap = -1.0F; }},
    {"NaN softcap", "softcap", kRagged, [](A& a, P&) { a.params.softcap = kNan; }},
    {"window_left of -2", "window_left", kRagged, [](A& a, P&) { a.params.window_left = -2; }},
    {"window_right of -2", "window_right", kRagged, [](A& a, P&) { a.params.window_right = -2; }},
    {"number of sinks", "sinks", kRagged,
     [](A& a, P& p) { a.params.sinks = {p.q.view().data, DType::f32, {3}}; }},
    {"rank of sinks", "sinks", kRagged,
     [](A& a, P& p) { a.params.sinks = {p.q.view().data, DType::f32, {1, 4}}; }},
    {"dtype of sinks", "sinks", kPaged,
     [](A& a, P& p) { a.params.sinks = {p.q.view().data, DType::bf16, {4}}; }},
    {"a sink that is NaN", "sinks", kPaged,
     [](A& a, P&) { a.params.sinks = {kNanSinks, DType::f32, {4}}; }},
    {"a sink that is infinite", "sinks", kRagged,
     [](A& a, P&) { a.params.sinks = {kInfiniteSinks, DType::f32, {4}}; }},
    {"number of slopes", "alibi_slopes", kRagged,
     [](A& a, P& p) { a.params.alibi_slopes = {p.q.view().data, DType::f32, {3}}; }},
    {"rows of slopes", "alibi_slopes", kRagged,
     [](A& a, P& p) { a.params.alibi_slopes = {p.q.view().data, DType::f32, {3, 4}}; }},
    {"dtype of slopes", "alibi_slopes", kRagged,
     [](A& a, P& p) { a.params.alibi_slopes = {p.q.view().data, DType::f16, {4}}; }},
};

void expect_refused(const std::vector<Spoilt>& list) {
  for (const Spoilt& s : list) {
    SCOPED_TRACE(s.how);
    VarlenProblem problem = small_problem(s.kv);
    FlashAttnVarlenArgs args = problem.args();
    s.spoil(args, problem);
    try {
      flash_attn_varlen(args);
      ADD_FAILURE() << "accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "flash_attn_varlen") << e.what();
      EXPECT_EQ(e.argument(), s.argument) << e.what();
    }
    EXPECT_EQ(problem.out.damage(), "");
    EXPECT_EQ(problem.lse.damage(), "");
  }
}

TEST(FlashAttnVarlenBadInput, Tensors) { expect_refused(kTensors); }
TEST(FlashAttnVarlenBadInput, Lengths) { expect_refused(kLengths); }
TEST(FlashAttnVarlenBadInput, Parameters) { expect_refused(kParams); }

TEST(FlashAttnVarlenBadInput, TheUnspoiltProblemsAreAccepted) {
  for (const KvStorage kv : {kRagged, kPaged}) {
    const VarlenProblem problem = small_problem(kv);
    EXPECT_NO_THROW(flash_attn_varlen(problem.args()));
    EXPECT_NE(problem.out.damage(), "");
  }
}

TEST(FlashAttnVarlenBadInput, GarbageBeyondTheUsedBlocksIsAccepted) {
  VarlenProblem problem = small_problem(kPaged);
  const std::int64_t width = problem.block_table.view().shape[1];
  for (const std::int32_t garbage : {std::numeric_limits<std::int32_t>::max(), -1, 1 << 20}) {
    for (std::int64_t b = 2; b < width; ++b) entry(problem.block_table, b) = garbage;
    EXPECT_NO_THROW(flash_attn_varlen(problem.args()));
  }
}

/// A plan for small_problem(kRagged), run by the default executor.
AttentionPlan small_plan(const VarlenProblem& problem) {
  static const std::vector<std::int32_t> starts{0, 3, 5}, keys{20, 5};
  AttentionPlanInput input;
  input.query_start_loc = starts;
  input.seq_lens = keys;
  input.num_q_heads = problem.shape.q_heads();
  input.num_kv_heads = problem.shape.kv_heads;
  input.head_dim_qk = problem.shape.head_dim;
  input.head_dim_v = problem.shape.head_dim_v;
  input.num_workers = default_executor().num_workers();
  return plan_attention(input);
}

void expect_plan_refused(const VarlenProblem& problem, const AttentionPlan& plan,
                         Workspace workspace, const char* argument) {
  SCOPED_TRACE(argument);
  try {
    flash_attn_varlen(problem.args(), plan, workspace, default_executor());
    ADD_FAILURE() << "accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.op(), "flash_attn_varlen") << e.what();
    EXPECT_EQ(e.argument(), argument) << e.what();
  }
  EXPECT_EQ(problem.out.damage(), "");
}

TEST(FlashAttnVarlenBadInput, PlansOfOtherShapes) {
  const VarlenProblem problem = small_problem(kRagged);
  const AttentionPlan plan = small_plan(problem);
  Buffer buffer(plan.workspace_bytes);
  const Workspace good = buffer.workspace();

  expect_plan_refused(problem, plan, {buffer.data(), plan.workspace_bytes - 1}, "workspace");
  expect_plan_refused(problem, plan, {nullptr, plan.workspace_bytes}, "workspace");
  AttentionPlan other = plan;
  other.num_workers += 1;
  expect_plan_refused(problem, other, good, "executor");
  other = plan;
  other.query_start_loc = {0, 2, 5};
  expect_plan_refused(problem, other, good, "query_start_loc");
  other = plan;
  other.num_q_heads = 8;
  expect_plan_refused(problem, other, good, "q");
  other = plan;
  other.head_dim_v = 16;
  expect_plan_refused(problem, other, good, "v");
  other = plan;
  other.window_left = 3;
  expect_plan_refused(problem, other, good, "window_left");
  other = plan;
  other.seq_lens = {19, 6};
  expect_plan_refused(problem, other, good, "cu_seqlens_kv");
}

}  // namespace
}  // namespace attend
