// SPDX-License-Identifier: Apache-2.0
// Whatever is wrong with a call of mla_decode, the error names it and nothing is written.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "latent_batch.h"

namespace attend::testing {
namespace {

using A = MlaDecodeArgs;
using B = LatentBatch;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct BadCall {
  const char* label;
  const char* argument;
  std::function<void(A&, B&)> change;
  DType dtype = DType::bf16, cache = DType::bf16;
};
void PrintTo(const BadCall& b, std::ostream* os) { *os << b.label; }

BadCall fp8(const char* label, const char* argument, std::function<void(A&, B&)> change) {
  return {label, argument, std::move(change), DType::bf16, DType::fp8_e4m3};
}
BadCall ds(const char* label, const char* argument, std::function<void(A&, B&)> change) {
  return {label, argument, std::move(change), DType::bf16, DType::u8};
}

std::int32_t& entry(B& b, int r, int i) {
  return b.block_table.view().select(0, r).as<std::int32_t>()[i];
}

const BadCall kBadCalls[] = {
    {"no_scale", "scale", [](A& a, B&) { a.params.scale.reset(); }},
    {"scale_of_zero", "scale", [](A& a, B&) { a.params.scale = 0.0F; }},
    {"scale_of_nan", "scale", [](A& a, B&) { a.params.scale = kNan; }},
    {"softcap_negative", "softcap", [](A& a, B&) { a.params.softcap = -1.0F; }},
    {"window_left", "window_left", [](A& a, B&) { a.params.window_left = -2; }},
    {"window_right", "window_right", [](A& a, B&) { a.params.window_right = -2; }},
    {"sinks_of_other_heads", "sinks", [](A& a, B& b) { a.params.sinks = b.kv_scale; }},
    {"slopes_of_other_heads", "alibi_slopes",
     [](A& a, B& b) { a.params.alibi_slopes = b.kv_scale; }},
    {"q_undefined", "q", [](A& a, B&) { a.q = {}; }},
    {"q_rank", "q", [](A& a, B&) { a.q = a.q.select(0, 0); }},
    {"q_dtype", "q", [](A& a, B&) { a.q.dtype = DType::i8; }},
    {"q_device", "q", [](A& a, B&) { a.q.device.type = DeviceType::cuda; }},
    {"q_stride", "q", [](A& a, B&) { a.q.strides[2] = 2; }},
    {"q_without_heads", "q", [](A& a, B&) { a.q = a.q.slice(1, 0, 0); }},
    {"q_rows", "query_start_loc", [](A&, B& b) { b.query_start_loc.as<std::int32_t>()[1] = -1; }},
    {"q_dim_584", "q", [](A& a, B&) { a.q.shape[2] = a.kv_cache.shape[2] = 584; }},
    {"q_dim_12", "q", [](A& a, B&) { a.q.shape[2] = a.kv_cache.shape[2] = 12; }},
    {"q_dim_0", "q", [](A& a, B&) { a.q.shape[2] = a.kv_cache.shape[2] = 0; }},
    {"cache_undefined", "kv_cache", [](A& a, B&) { a.kv_cache = {}; }},
    {"cache_dtype", "kv_cache", [](A& a, B&) { a.kv_cache.dtype = DType::f16; }},
    {"cache_rank", "kv_cache", [](A& a, B&) { a.kv_cache = a.kv_cache.select(0, 0); }},
    {"cache_dim", "kv_cache", [](A& a, B&) { a.kv_cache.shape[2] = 512; }},
    {"cache_stride", "kv_cache", [](A& a, B&) { a.kv_cache.strides[2] = 2; }},
    {"cache_block_size_2", "kv_cache", [](A& a, B&) { a.kv_cache.shape[1] = 2; }},
    {"cache_block_size_24", "kv_cache", [](A& a, B&) { a.kv_cache.shape[1] = 24; }},
    {"cache_of_bytes", "q",
     [](A& a, B&) {
       a.kv_cache.dtype = DType::u8;
       a.q.dtype = a.out.dtype = DType::f16;
     }},
    {"cache_of_plain_bytes", "kv_cache", [](A& a, B&) { a.kv_cache.dtype = DType::u8; }},
    {"out_undefined", "out", [](A& a, B&) { a.out = {}; }},
    {"out_dtype", "out", [](A& a, B&) { a.out.dtype = DType::f16; }},
    {"out_heads", "out", [](A& a, B&) { a.out.shape[1] = 3; }},
    {"out_rows", "out", [](A& a, B&) { a.out.shape[0] -= 1; }},
    {"out_stride", "out", [](A& a, B&) { a.out.strides[2] = 2; }},
    {"out_rows_alias", "out", [](A& a, B&) { a.out.strides[0] = 0; }},
    {"latent_of_520", "out", [](A& a, B&) { a.out.shape[2] = 520; }},
    {"latent_of_12", "out", [](A& a, B&) { a.out.shape[2] = 12; }},
    {"latent_of_0", "out", [](A& a, B&) { a.out.shape[2] = 0; }},
    {"latent_beyond_a_row", "out",
     [](A& a, B&) {
       a.q = a.q.slice(2, 0, 320);
       a.kv_cache = a.kv_cache.slice(2, 0, 320);
       a.out = a.out.slice(2, 0, 328);
     }},
    {"out_is_q", "out", [](A& a, B& b) { a.out.data = b.q.view().data; }},
    {"out_in_the_cache", "out", [](A& a, B& b) { a.out.data = b.cache.view().data; }},
    {"lse_dtype", "lse", [](A& a, B&) { a.lse.dtype = DType::i32; }},
    {"lse_rows", "lse", [](A& a, B&) { a.lse.shape[0] -= 1; }},
    {"lse_heads", "lse", [](A& a, B&) { a.lse.shape[1] = 3; }},
    {"lse_rows_alias", "lse", [](A& a, B&) { a.lse.strides[0] = 0; }},
    {"lse_in_out", "lse", [](A& a, B& b) { a.lse.data = b.out.view().data; }},
    {"lse_in_q", "lse", [](A& a, B& b) { a.lse.data = b.q.view().data; }},
    {"table_undefined", "block_table", [](A& a, B&) { a.block_table = {}; }},
    {"table_dtype", "block_table", [](A& a, B&) { a.block_table.dtype = DType::f32; }},
    {"table_rows", "block_table", [](A& a, B&) { a.block_table.shape[0] = 1; }},
    {"table_stride", "block_table", [](A& a, B&) { a.block_table.strides[1] = 2; }},
    {"block_beyond_the_cache", "block_table",
     [](A&, B& b) { entry(b, 0, 2) = static_cast<std::int32_t>(b.cache.view().shape[0]); }},
    {"block_negative", "block_table", [](A&, B& b) { entry(b, 1, 1) = -1; }},
    {"keys_beyond_the_table", "seq_lens",
     [](A&, B& b) { b.seq_lens.as<std::int32_t>()[1] = 1 << 20; }},
    {"keys_negative", "seq_lens", [](A&, B& b) { b.seq_lens.as<std::int32_t>()[1] = -1; }},
    {"lengths_undefined", "seq_lens", [](A& a, B&) { a.seq_lens = {}; }},
    {"lengths_of_another_batch", "seq_lens", [](A& a, B&) { a.seq_lens.shape[0] = 1; }},
    {"lengths_dtype", "seq_lens", [](A& a, B&) { a.seq_lens.dtype = DType::f32; }},
    {"starts_undefined", "query_start_loc", [](A& a, B&) { a.query_start_loc = {}; }},
    {"starts_decrease", "query_start_loc",
     [](A&, B& b) { b.query_start_loc.as<std::int32_t>()[2] = 0; }},
    {"tokens_beyond_q", "q", [](A&, B& b) { b.query_start_loc.as<std::int32_t>()[2] = 4; }},
    {"scale_of_a_bf16_cache", "kv_scale", [](A& a, B& b) { a.kv_scale = b.kv_scale; }},
    fp8("no_kv_scale", "kv_scale", [](A& a, B&) { a.kv_scale = {}; }),
    fp8("kv_scale_dtype", "kv_scale", [](A& a, B&) { a.kv_scale.dtype = DType::i32; }),
    fp8("kv_scale_of_heads", "kv_scale",
        [](A& a, B& b) { a.kv_scale = b.lse.view().select(0, 0); }),
    fp8("kv_scale_rank", "kv_scale", [](A& a, B& b) { a.kv_scale = b.lse; }),
    fp8("kv_scale_0", "kv_scale", [](A&, B& b) { b.kv_scale.as<float>()[0] = 0.0F; }),
    fp8("kv_scale_negative", "kv_scale", [](A&, B& b) { b.kv_scale.as<float>()[0] = -1.0F; }),
    fp8("kv_scale_infinite", "kv_scale", [](A&, B& b) { b.kv_scale.as<float>()[0] = kInf; }),
    fp8("kv_scale_nan", "kv_scale", [](A&, B& b) { b.kv_scale.as<float>()[0] = kNan; }),
    fp8("out_in_kv_scale", "lse",
        [](A& a, B&) {
          a.kv_scale = {a.lse.data, DType::f32, {1}};
          *a.lse.as<float>() = 1.0F;
        }),
    ds("ds_scale", "kv_scale", [](A& a, B& b) { a.kv_scale = b.kv_scale; }),
    ds("ds_queries_f16", "q", [](A& a, B&) { a.q.dtype = a.out.dtype = DType::f16; }),
    ds("ds_queries_of_320", "q", [](A& a, B&) { a.q = a.q.slice(2, 0, 320); }),
    ds("ds_rows_of_576", "kv_cache", [](A& a, B&) { a.kv_cache = a.kv_cache.slice(2, 0, 576); }),
    ds("ds_latent_of_256", "out", [](A& a, B&) { a.out = a.out.slice(2, 0, 256); }),
};

class MlaDecodeBadInput : public ::testing::TestWithParam<BadCall> {
 protected:
  static LatentBatch batch() {
    LatentOptions o;
    o.dtype = GetParam().dtype;
    o.cache = GetParam().cache;
    return {o, {{0, 40, 1}, {1, 20, 2}}};
  }
  template <typename Call>
  static void expect_refused(const LatentBatch& b, std::string_view argument, Call&& call) {
    const auto out = b.out.snapshot(), lse = b.lse.snapshot(), cache = b.cache.snapshot();
    try {
      call();
      ADD_FAILURE() << "no exception";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), argument) << e.what();
      EXPECT_EQ(e.op(), "mla_decode") << e.what();
    }
    EXPECT_EQ(b.out.snapshot(), out);
    EXPECT_EQ(b.lse.snapshot(), lse);
    EXPECT_EQ(b.cache.snapshot(), cache);
  }
};

TEST_P(MlaDecodeBadInput, NamesTheArgumentAndWritesNothing) {
  LatentBatch b = batch();
  mla_decode(b.args());  // as it is, the call is good
  b.out.fill_bytes(0x5a);
  b.lse.fill_bytes(0x5a);
  MlaDecodeArgs a = b.args();
  GetParam().change(a, b);
  expect_refused(b, GetParam().argument, [&] { mla_decode(a); });
}

INSTANTIATE_TEST_SUITE_P(All, MlaDecodeBadInput, ::testing::ValuesIn(kBadCalls),
                         [](const auto& info) { return std::string(info.param.label); });

struct Planned {
  LatentBatch batch;
  AttentionPlan plan;
  std::unique_ptr<Executor> executor;
  Buffer workspace;
};

Planned planned() {
  Planned p{LatentBatch({}, {{0, 600, 1}, {1, 20, 2}}), {}, make_thread_pool(2), {}};
  p.plan = plan_mla_decode(p.batch.plan_input(2));
  p.workspace.reserve(p.plan.workspace_bytes);
  return p;
}

std::string refusal(const Planned& p, const MlaDecodeArgs& a, Workspace workspace,
                    Executor& executor) {
  const auto out = p.batch.out.snapshot();
  std::string text = "accepted";
  try {
    mla_decode(a, p.plan, workspace, executor);
  } catch (const InvalidArgument& e) {
    text = e.argument();
  }
  if (text != "accepted" && p.batch.out.snapshot() != out) text += ", but wrote";
  try {
    validate(a, p.plan, workspace, executor);
    EXPECT_EQ(text, "accepted");
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), text);
  }
  return text;
}

TEST(MlaDecodeBadPlan, NamesWhatDiffers) {
  const Planned p = planned();
  const auto with = [&](auto change) {
    MlaDecodeArgs a = p.batch.args();
    change(a);
    return refusal(p, a, p.workspace.workspace(), *p.executor);
  };
  EXPECT_EQ(with([](auto&) {}), "accepted");
  const LatentBatch other({}, {{0, 601, 1}, {1, 20, 2}}), moved({}, {{0, 600, 2}, {1, 20, 1}}),
      longer({}, {{0, 600, 1}, {1, 20, 3}});
  EXPECT_EQ(with([&](auto& a) { a.seq_lens = other.seq_lens; }), "seq_lens");
  EXPECT_EQ(with([&](auto& a) { a.query_start_loc = moved.query_start_loc; }), "query_start_loc");
  EXPECT_EQ(with([&](auto& a) {
              a = longer.args();
              a.seq_lens = a.query_start_loc = {};
            }),
            "q");
  EXPECT_EQ(with([](auto& a) {
              a.q = a.q.slice(1, 0, 2);
              a.out = a.out.slice(1, 0, 2);
              a.lse = a.lse.slice(1, 0, 2);
            }),
            "q");
  EXPECT_EQ(with([](auto& a) {
              a.q = a.q.slice(2, 0, 568);
              a.kv_cache = a.kv_cache.slice(2, 0, 568);
            }),
            "q");
  EXPECT_EQ(with([](auto& a) { a.out = a.out.slice(2, 0, 504); }), "out");
  EXPECT_EQ(with([](auto& a) { a.params.window_left = 5; }), "window_left");
}

TEST(MlaDecodeBadPlan, NamesWhatIsTooSmall) {
  const Planned p = planned();
  const MlaDecodeArgs a = p.batch.args();
  Workspace workspace = p.workspace.workspace();
  workspace.size = p.plan.workspace_bytes - 1;
  EXPECT_EQ(refusal(p, a, workspace, *p.executor), "workspace");
  workspace.data = nullptr;
  EXPECT_EQ(refusal(p, a, workspace, *p.executor), "workspace");
  const auto other = make_thread_pool(3);
  EXPECT_EQ(refusal(p, a, p.workspace.workspace(), *other), "executor");
}

TEST(MlaDecodeBadPlan, HasOneKvHead) {
  const LatentBatch b({}, {{0, 20, 1}});
  AttentionPlanInput in = b.plan_input(1);
  for (const int heads : {0, 2, 4}) {
    in.num_kv_heads = heads;
    try {
      plan_mla_decode(in);
      ADD_FAILURE() << heads;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), "num_kv_heads");
    }
  }
  in.num_kv_heads = 1;
  in.num_q_heads = 0;
  EXPECT_THROW(plan_mla_decode(in), InvalidArgument);
  in = b.plan_input(0);
  EXPECT_THROW(plan_mla_decode(in), InvalidArgument);
}

}  // namespace
}  // namespace attend::testing
