// SPDX-License-Identifier: Apache-2.0
// Everything that flash_attn_varlen_int8 must refuse, by name, without touching its outputs.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "attend/ops/int8_attention.h"
#include "conformance/int8_problem.h"

namespace attend {
namespace {

using conformance::AttentionShape;
using conformance::Int8Options;
using conformance::Int8Problem;
using conformance::Rng;

Int8Problem small_problem(DType values) {
  Rng rng(5);
  AttentionShape shape;
  shape.kv_heads = 2;
  shape.group_size = 2;
  shape.head_dim = 16;
  shape.head_dim_v = 24;
  shape.query_lens = {3, 2};
  shape.seq_lens = {20, 5};
  shape.causal = true;
  Int8Options options;
  options.values = values;
  options.smooth_keys = true;
  Int8Problem problem(rng, shape, options);
  problem.reset();
  return problem;
}

using A = FlashAttnVarlenInt8Args;
using P = Int8Problem;

/// One way to spoil a valid call, and the argument that the error must name.
struct Spoilt {
  const char* how;
  const char* argument;
  std::function<void(A&, P&)> spoil;
};

void set_v_scale(P& p, double value) { p.v_scale.set(p.v_scale.offset({1, 5}), value); }

const std::vector<Spoilt> kSpoilt{
    {"null q", "q", [](A& a, P&) { a.q.data = nullptr; }},
    {"f16 queries", "q", [](A& a, P&) { a.q.dtype = DType::f16; }},
    {"rank of q", "q", [](A& a, P&) { a.q = a.q.select(0, 0); }},
    {"u8 keys", "k", [](A& a, P&) { a.k.dtype = DType::u8; }},
    {"f32 values", "v", [](A& a, P&) { a.v.dtype = DType::f32; }},
    {"blocks of v", "v", [](A& a, P&) { a.v = a.v.slice(0, 0, a.v.shape[0] - 1); }},
    {"head size of k", "k", [](A& a, P&) { a.k = a.k.slice(3, 0, 8); }},
    {"heads of q", "q", [](A& a, P&) { a.q = a.q.slice(1, 0, 3); }},
    {"i8 output", "out", [](A& a, P&) { a.out.dtype = DType::i8; }},
    {"q_scale missing", "q_scale", [](A& a, P&) { a.q_scale = {}; }},
    {"q_scale [T, Hq]", "q_scale", [](A& a, P&) { a.q_scale = a.q_scale.permute({1, 0}); }},
    {"q_scale bf16", "q_scale", [](A& a, P&) { a.q_scale.dtype = DType::bf16; }},
    {"k_scale missing", "k_scale", [](A& a, P&) { a.k_scale = {}; }},
    {"k_scale [n, bs, Hkv]", "k_scale", [](A& a, P&) { a.k_scale = a.k_scale.permute({0, 2, 1}); }},
    {"v_scale missing", "v_scale", [](A& a, P&) { a.v_scale = {}; }},
    {"v_scale of too few heads", "v_scale", [](A& a, P&) { a.v_scale = a.v_scale.slice(0, 0, 1); }},
    {"v_scale strided", "v_scale",
     [](A& a, P& p) {
       a.v_scale = ConstTensorView(p.q_scale.view().data, DType::f32, {24, 2}).permute({1, 0});
     }},
    {"v_scale 0", "v_scale", [](A&, P& p) { set_v_scale(p, 0.0); }},
    {"v_scale negative", "v_scale", [](A&, P& p) { set_v_scale(p, -1.0); }},
    {"v_scale NaN", "v_scale", [](A&, P& p) { set_v_scale(p, std::nan("")); }},
    {"v_scale infinite", "v_scale",
     [](A&, P& p) { set_v_scale(p, std::numeric_limits<double>::infinity()); }},
    {"k_mean of too few requests", "k_mean", [](A& a, P&) { a.k_mean = a.k_mean.slice(0, 0, 1); }},
    {"k_mean of another size", "k_mean", [](A& a, P&) { a.k_mean = a.k_mean.slice(2, 0, 8); }},
    {"query_start_loc missing", "query_start_loc", [](A& a, P&) { a.query_start_loc = {}; }},
    {"seq_lens missing", "seq_lens", [](A& a, P&) { a.seq_lens = {}; }},
    {"block_table missing", "block_table", [](A& a, P&) { a.block_table = {}; }},
    {"negative length", "seq_lens", [](A&, P& p) { p.seq_lens.view().as<std::int32_t>()[1] = -1; }},
    {"longer than the table", "seq_lens",
     [](A&, P& p) { p.seq_lens.view().as<std::int32_t>()[0] = 1 << 20; }},
    {"block id too large", "block_table",
     [](A&, P& p) {
       p.blocks.table.view().as<std::int32_t>()[p.blocks.table.offset({0, 1})] = 99;
     }},
    {"block id negative", "block_table",
     [](A&, P& p) {
       p.blocks.table.view().as<std::int32_t>()[p.blocks.table.offset({1, 0})] = -1;
     }},
    {"softcap NaN", "softcap", [](A& a, P&) { a.params.softcap = std::nanf(""); }},
    {"window", "window_left", [](A& a, P&) { a.params.window_left = -2; }},
    {"out over scales", "out", [](A& a, P&) { a.out.data = const_cast<void*>(a.k_scale.data); }},
    {"lse over out", "lse", [](A& a, P&) { a.lse.data = a.out.data; }},
    {"lse over the mean", "lse", [](A& a, P&) { a.lse.data = const_cast<void*>(a.k_mean.data); }},
};

TEST(Int8AttentionBadInput, IsRefusedByNameBeforeAnythingIsWritten) {
  for (const Spoilt& s : kSpoilt) {
    SCOPED_TRACE(s.how);
    Int8Problem p = small_problem(DType::i8);
    A args = p.args();
    s.spoil(args, p);
    try {
      flash_attn_varlen_int8(args);
      ADD_FAILURE() << "accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), s.argument) << e.what();
      EXPECT_EQ(e.op(), "flash_attn_varlen_int8");
    }
    EXPECT_EQ(p.out.damage(), "");
    EXPECT_EQ(p.lse.damage(), "");
  }
}

TEST(Int8AttentionBadInput, ScalesOfValuesNeedInt8Values) {
  Int8Problem level1 = small_problem(DType::i8), level2 = small_problem(DType::bf16);
  A args = level2.args();
  args.v_scale = level1.v_scale.view();
  try {
    flash_attn_varlen_int8(args);
    ADD_FAILURE() << "accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "v_scale") << e.what();
  }
}

TEST(Int8AttentionBadInput, APlanOfAnotherShapeIsRefused) {
  Int8Problem p = small_problem(DType::i8);
  const std::int32_t starts[] = {0, 3, 5}, lens[] = {20, 6};
  AttentionPlanInput in;
  in.query_start_loc = starts;
  in.seq_lens = lens;
  in.num_q_heads = 4;
  in.num_kv_heads = 2;
  in.head_dim_qk = 16;
  in.head_dim_v = 24;
  const AttentionPlan plan = plan_attention(in);
  Buffer workspace(plan.workspace_bytes);
  const auto executor = make_thread_pool(1);
  EXPECT_THROW(flash_attn_varlen_int8(p.args(), plan, workspace.workspace(), *executor),
               InvalidArgument);
  EXPECT_EQ(p.out.damage(), "");
}

}  // namespace
}  // namespace attend
