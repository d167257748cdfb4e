// SPDX-License-Identifier: Apache-2.0
// A call of FLASH_ATTN_MLA that is wrong writes neither results nor the cache.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "mla_layer.h"

namespace attend::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using A = ForwardArgs;
struct Bench {
  MlaLayer& layer;
  MlaStep& step;
};

struct BadCall {
  const char* label;
  const char* argument;
  std::function<void(A&, Bench&)> change;
};
void PrintTo(const BadCall& b, std::ostream* os) { *os << b.label; }

std::int32_t& entry(Bench& b, int r, int i) {
  return b.step.block_table.view().select(0, r).as<std::int32_t>()[i];
}

const BadCall kBadCalls[] = {
    {"query_undefined", "query", [](A& a, Bench&) { a.query = {}; }},
    {"query_rank", "query", [](A& a, Bench&) { a.query = a.query.select(1, 0); }},
    {"query_dtype", "query", [](A& a, Bench&) { a.query.dtype = DType::f16; }},
    {"query_device", "query", [](A& a, Bench&) { a.query.device.type = DeviceType::cuda; }},
    {"query_rows", "query", [](A& a, Bench&) { a.query.shape[0] -= 1; }},
    {"query_heads", "query", [](A& a, Bench&) { a.query.shape[1] = 2; }},
    {"query_dim", "query", [](A& a, Bench&) { a.query.shape[2] = 80; }},
    {"query_stride", "query", [](A& a, Bench&) { a.query.strides[2] = 2; }},
    {"key_given", "key", [](A& a, Bench&) { a.key = a.query; }},
    {"value_given", "value", [](A& a, Bench&) { a.value = a.query; }},
    {"kv_c_undefined", "kv_c", [](A& a, Bench&) { a.kv_c = {}; }},
    {"kv_c_dtype", "kv_c", [](A& a, Bench&) { a.kv_c.dtype = DType::f16; }},
    {"kv_c_rank", "kv_c", [](A& a, Bench&) { a.kv_c = a.kv_c.select(0, 0); }},
    {"kv_c_dim", "kv_c", [](A& a, Bench&) { a.kv_c.shape[1] = 16; }},
    {"kv_c_rows", "kv_c", [](A& a, Bench&) { a.kv_c.shape[0] -= 1; }},
    {"kv_c_stride", "kv_c", [](A& a, Bench&) { a.kv_c.strides[1] = 2; }},
    {"k_pe_undefined", "k_pe", [](A& a, Bench&) { a.k_pe = {}; }},
    {"k_pe_dtype", "k_pe", [](A& a, Bench&) { a.k_pe.dtype = DType::f16; }},
    {"k_pe_dim", "k_pe", [](A& a, Bench&) { a.k_pe.shape[1] = 8; }},
    {"k_pe_rows", "k_pe", [](A& a, Bench&) { a.k_pe.shape[0] -= 1; }},
    {"cache_undefined", "kv_cache", [](A& a, Bench&) { a.kv_cache = {}; }},
    {"cache_dtype", "kv_cache", [](A& a, Bench&) { a.kv_cache.dtype = DType::f16; }},
    {"cache_block_size", "kv_cache", [](A& a, Bench&) { a.kv_cache.shape[1] = 8; }},
    {"cache_dim", "kv_cache", [](A& a, Bench&) { a.kv_cache.shape[2] = 64; }},
    {"cache_stride", "kv_cache", [](A& a, Bench&) { a.kv_cache.strides[2] = 2; }},
    {"cache_blocks_alias", "kv_cache", [](A& a, Bench&) { a.kv_cache.strides[0] = 0; }},
    {"cache_without_the_slots", "kv_cache", [](A& a, Bench&) { a.kv_cache.shape[0] = 100; }},
    {"cache_is_the_query", "kv_cache", [](A& a, Bench&) { a.query.data = a.kv_cache.data; }},
    {"cache_is_kv_c", "kv_cache", [](A& a, Bench&) { a.kv_c.data = a.kv_cache.data; }},
    {"cache_is_k_pe", "kv_cache", [](A& a, Bench&) { a.k_pe.data = a.kv_cache.data; }},
    {"scale_cache_given", "kv_scale_cache", [](A& a, Bench&) { a.kv_scale_cache = a.lse; }},
    {"output_undefined", "output", [](A& a, Bench&) { a.output = {}; }},
    {"output_dtype", "output", [](A& a, Bench&) { a.output.dtype = DType::f16; }},
    {"output_codes_without_scale", "output",
     [](A& a, Bench&) { a.output.dtype = DType::fp8_e4m3; }},
    {"output_scale_without_codes", "output", [](A& a, Bench&) { a.output_scale = 1.0F; }},
    {"output_rows", "output",
     [](A& a, Bench&) {
       a.output.shape[0] -= 1;
       a.lse.shape[0] -= 1;
     }},
    {"output_heads", "output", [](A& a, Bench&) { a.output.shape[1] = 2; }},
    {"output_dim", "output", [](A& a, Bench&) { a.output.shape[2] = 16; }},
    {"output_stride", "output", [](A& a, Bench&) { a.output.strides[2] = 2; }},
    {"output_rows_alias", "output", [](A& a, Bench&) { a.output.strides[0] = 0; }},
    {"output_is_the_query", "output", [](A& a, Bench&) { a.query.data = a.output.data; }},
    {"output_in_the_cache", "output", [](A& a, Bench&) { a.output.data = a.kv_cache.data; }},
    {"output_in_the_table", "output",
     [](A& a, Bench& b) {
       a.output.data = b.step.block_table.view().data;
       a.lse = {};  // which may lie behind the table, whose memory ends before the output's would
     }},
    {"lse_dtype", "lse", [](A& a, Bench&) { a.lse.dtype = DType::i32; }},
    {"lse_rows", "lse", [](A& a, Bench&) { a.lse.shape[0] -= 1; }},
    {"lse_heads", "lse", [](A& a, Bench&) { a.lse.shape[1] = 2; }},
    {"lse_rows_alias", "lse", [](A& a, Bench&) { a.lse.strides[0] = 0; }},
    {"lse_in_output", "lse", [](A& a, Bench&) { a.lse.data = a.output.data; }},
    {"lse_in_k_pe", "lse", [](A& a, Bench&) { a.k_pe.data = a.lse.data; }},
    {"output_codes_unplanned", "output_scale",
     [](A& a, Bench&) {
       a.output.dtype = DType::fp8_e4m3;
       a.output_scale = 1.0F;
     }},
    {"output_scale_0", "output_scale",
     [](A& a, Bench&) {
       a.output.dtype = DType::fp8_e4m3;
       a.output_scale = 0.0F;
     }},
    {"output_scale_nan", "output_scale",
     [](A& a, Bench&) {
       a.output.dtype = DType::fp8_e4m3;
       a.output_scale = kNan;
     }},
    {"block_beyond_the_cache", "block_table", [](A&, Bench& b) { entry(b, 0, 2) = 1 << 20; }},
    {"block_negative", "block_table", [](A&, Bench& b) { entry(b, 1, 19) = -1; }},
    {"workspace_null", "workspace", [](A& a, Bench&) { a.workspace.data = nullptr; }},
    {"workspace_small", "workspace",
     [](A& a, Bench& b) { a.workspace.size = b.step.metadata->workspace_bytes() - 1; }},
};

class MlaBadCall : public ::testing::TestWithParam<BadCall> {};

void expect_refused(const MlaLayer& layer, std::string_view argument,
                    const std::function<void()>& call) {
  const auto output = layer.output->snapshot(), lse = layer.lse->snapshot(),
             cache = layer.cache.snapshot();
  try {
    call();
    ADD_FAILURE() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), argument) << e.what();
    EXPECT_EQ(e.op(), "FLASH_ATTN_MLA.forward") << e.what();
  }
  EXPECT_EQ(layer.output->snapshot(), output);
  EXPECT_EQ(layer.lse->snapshot(), lse);
  EXPECT_EQ(layer.cache.snapshot(), cache);
}

/// A decode, and a prefill with a chunk of context.
const std::vector<MlaStepRequest> kStep = {{0, 40, 1}, {1, 300, 20}};

TEST_P(MlaBadCall, NamesTheArgumentAndWritesNothing) {
  const auto executor = make_thread_pool(2);
  MlaLayer layer({}, *executor);
  MlaStep step = layer.prepare(kStep);
  ForwardArgs args = step.args;
  Bench bench{layer, step};
  GetParam().change(args, bench);
  expect_refused(layer, GetParam().argument,
                 [&] { layer.impl->forward(args, step.metadata.get()); });
}

INSTANTIATE_TEST_SUITE_P(All, MlaBadCall, ::testing::ValuesIn(kBadCalls),
                         [](const auto& info) { return std::string(info.param.label); });

TEST(MlaBadExecutor, HasOtherWorkers) {
  const auto two = make_thread_pool(2), three = make_thread_pool(3);
  MlaLayer layer({}, *two);
  for (const std::vector<MlaStepRequest>& requests :
       {std::vector<MlaStepRequest>{{0, 40, 1}}, {{0, 0, 20}}}) {
    MlaStep step = layer.prepare(requests);
    step.args.executor = three.get();
    expect_refused(layer, "executor", [&] { layer.impl->forward(step.args, step.metadata.get()); });
  }
}

struct OtherMetadata final : Metadata {
  std::size_t workspace_bytes() const noexcept override { return 0; }
};

TEST(MlaBadMetadata, IsThatOfOtherLayers) {
  const auto executor = make_thread_pool(1);
  MlaSetup setup;
  setup.dims = {512, 32, 64, 24};
  MlaLayer layer(setup, *executor);
  layer.workspace.reserve(std::size_t{64} << 20);
  MlaStep step = layer.prepare(kStep);
  step.args.workspace = layer.workspace.workspace();
  const auto refused = [&](const Metadata& metadata) {
    expect_refused(layer, "metadata", [&] { layer.impl->forward(step.args, &metadata); });
  };
  refused(OtherMetadata());
  const auto refused_of = [&](const std::function<void(MlaSetup&)>& change) {
    MlaSetup other = setup;
    change(other);
    MlaLayer others(other, *executor);
    refused(*others.prepare(kStep).metadata);
  };
  refused_of([](auto& s) { s.heads = 4; });
  refused_of([](auto& s) { s.dims.v_head_dim = 32; });
  refused_of([](auto& s) { s.dims.qk_nope_head_dim = 24; });
  refused_of([](auto& s) { s.dtype = DType::f16; });
  refused_of([](auto& s) { s.kv_cache_dtype = "fp8_ds_mla"; });
  refused_of([](auto& s) { s.kv_cache_dtype = "fp8_e4m3"; });
  refused_of([](auto& s) { s.prefill_backend = "ROCM_AITER_FA"; });
}

TEST(MlaBadMetadata, HasOtherBlocksThanTheCache) {
  const auto executor = make_thread_pool(1);
  MlaLayer layer({}, *executor);
  MlaSetup setup;
  setup.block_size = 32;
  MlaLayer others(setup, *executor);
  MlaStep step = layer.prepare(kStep);
  const MlaStep other = others.prepare(kStep);
  layer.workspace.reserve(other.metadata->workspace_bytes());
  step.args.workspace = layer.workspace.workspace();
  expect_refused(layer, "kv_cache", [&] { layer.impl->forward(step.args, other.metadata.get()); });
}

TEST(MlaBadMetadata, OfMoreTokensThanThereAre) {
  const auto executor = make_thread_pool(1);
  MlaLayer layer({}, *executor);
  MlaStep more = layer.prepare({{0, 40, 2}, {1, 300, 20}}), step = layer.prepare(kStep);
  step.args.workspace = layer.workspace.workspace();
  expect_refused(layer, "output", [&] { layer.impl->forward(step.args, more.metadata.get()); });
}

TEST(MlaBadUpdate, NamesTheArgument) {
  const auto executor = make_thread_pool(1);
  MlaLayer layer({}, *executor);
  const MlaStep step = layer.prepare(kStep);
  const auto refusal = [&](const Metadata& m, const ConstTensorView& table,
                           const std::vector<std::int64_t>& slots) -> std::string {
    try {
      (void)layer.builder->update_block_table(m, table, slots);
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "FLASH_ATTN_MLA.update_block_table");
      return e.argument();
    }
    return "accepted";
  };
  const ConstTensorView table = step.block_table;
  const std::vector<std::int64_t>& slots = step.batch.slot_mapping;
  EXPECT_EQ(refusal(*step.metadata, table, slots), "accepted");
  EXPECT_EQ(refusal(*step.metadata, table, {}), "accepted");
  EXPECT_EQ(refusal(OtherMetadata(), table, slots), "m");
  EXPECT_EQ(refusal(*step.metadata, {}, slots), "block_table");
  EXPECT_EQ(refusal(*step.metadata, table.slice(0, 0, 1), slots), "block_table");
  EXPECT_EQ(refusal(*step.metadata, table.slice(1, 0, 19), slots), "block_table");
  EXPECT_EQ(refusal(*step.metadata, table, {1, 2, 3}), "slot_mapping");
  std::vector<std::int64_t> beyond = slots;
  beyond.back() = 6 * 2048;
  EXPECT_EQ(refusal(*step.metadata, table, beyond), "slot_mapping");
}

}  // namespace
}  // namespace attend::testing
