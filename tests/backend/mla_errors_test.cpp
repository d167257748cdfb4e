// SPDX-License-Identifier: Apache-2.0
// Whatever is wrong with a layer of FLASH_ATTN_MLA, its batch or its call, the error names it and
// nothing is written.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

#include "attend/core/error.h"
#include "attend/plan/attention_plan.h"
#include "mla_layer.h"

namespace attend::testing {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const Backend& mla() { return find_backend("FLASH_ATTN_MLA"); }

/// "op argument" of the InvalidArgument that `call` throws; the reasons of Unsupported.
template <typename Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const InvalidArgument& e) {
    return e.op() + " " + e.argument();
  } catch (const Unsupported& e) {
    return "Unsupported: " + e.reasons().at(0);
  }
  return "accepted";
}

/// Fields of `Config` that a maker refuses.
template <typename Config>
struct BadConfig {
  const char* argument;
  std::function<void(Config&)> change;
};

MlaSetup ds_setup() {
  MlaSetup s;
  s.dims = {512, 32, 64, 24};
  s.kv_cache_dtype = "fp8_ds_mla";
  return s;
}

TEST(MlaBadBuilder, NamesTheField) {
  const auto executor = make_thread_pool(1);
  const BuilderConfig good = MlaLayer({}, *executor).builder_config();
  const auto after = [&](const std::function<void(BuilderConfig&)>& change) {
    BuilderConfig c = good;
    change(c);
    return refusal([&] { (void)mla().make_builder(c); });
  };
  EXPECT_EQ(after([](auto&) {}), "accepted");
  const BadConfig<BuilderConfig> bad[] = {
      {"mla", [](auto& c) { c.mla.reset(); }},
      {"mla.dtype", [](auto& c) { c.mla->dtype = DType::i8; }},
      {"kv_lora_rank", [](auto& c) { c.mla->dims.kv_lora_rank = 520; }},
      {"kv_lora_rank", [](auto& c) { c.mla->dims.kv_lora_rank = 0; }},
      {"qk_nope_head_dim", [](auto& c) { c.mla->dims.qk_nope_head_dim = 12; }},
      {"qk_nope_head_dim", [](auto& c) { c.mla->dims.qk_nope_head_dim = -8; }},
      {"qk_rope_head_dim", [](auto& c) { c.mla->dims.qk_rope_head_dim = 264; }},
      {"qk_nope_head_dim + qk_rope_head_dim", [](auto& c) { c.mla->dims.qk_nope_head_dim = 248; }},
      {"v_head_dim", [](auto& c) { c.mla->dims.v_head_dim = 264; }},
      {"kv_lora_rank + qk_rope_head_dim", [](auto& c) { c.mla->dims = {512, 32, 72, 24}; }},
      {"num_q_heads", [](auto& c) { c.num_q_heads = 0; }},
      {"num_kv_heads", [](auto& c) { c.cache.num_kv_heads = 2; }},
      {"head_size", [](auto& c) { c.cache.head_size = 64; }},
      {"cache.format", [](auto& c) { c.cache.format = KvFormat::int8_level1; }},
      {"cache.dtype", [](auto& c) { c.cache.dtype = DType::i8; }},
      {"cache.dtype", [](auto& c) { c.cache.dtype = DType::u8; }},
      {"cache.dtype", [](auto& c) { c.cache.dtype = DType::f16; }},
      {"num_blocks", [](auto& c) { c.cache.num_blocks = 0; }},
      {"block_size", [](auto& c) { c.cache.block_size = 8; }},
      {"block_size", [](auto& c) { c.cache.block_size = 0; }},
      {"attn_type", [](auto& c) { c.attn_type = AttentionType::encoder; }},
      {"window_left", [](auto& c) { c.window_left = 3; }},
      {"window_right", [](auto& c) { c.window_right = 1; }},
      {"num_speculative_tokens", [](auto& c) { c.num_speculative_tokens = -1; }},
      {"num_workers", [](auto& c) { c.num_workers = 0; }},
      {"max_num_splits", [](auto& c) { c.max_num_splits = -1; }},
      {"mla.max_model_len", [](auto& c) { c.mla->max_model_len = 0; }},
      {"mla.max_num_seqs", [](auto& c) { c.mla->max_num_seqs = 0; }},
      {"mla.decode_threshold", [](auto& c) { c.mla->decode_threshold = -1; }},
      {"mla.workspace_tokens", [](auto& c) { c.mla->workspace_tokens = kPieceSize - 1; }},
      {"mla.workspace_tokens",
       [](auto& c) {
         c.cache.block_size = 2 * kPieceSize;
         c.mla->workspace_tokens = kPieceSize;
       }},
  };
  for (const auto& b : bad) EXPECT_THAT(after(b.change), EndsWith(std::string(" ") + b.argument));
}

TEST(MlaBadBuilder, RowsOfFp8DsMlaHaveOneShapeAndBf16) {
  const auto executor = make_thread_pool(1);
  const BuilderConfig good = MlaLayer(ds_setup(), *executor).builder_config();
  const auto after = [&](const std::function<void(BuilderConfig&)>& change) {
    BuilderConfig c = good;
    change(c);
    return refusal([&] { (void)mla().make_builder(c); });
  };
  EXPECT_EQ(after([](auto&) {}), "accepted");
  EXPECT_EQ(after([](auto& c) { c.mla->dtype = DType::f16; }),
            "FLASH_ATTN_MLA.make_builder mla.dtype");
  EXPECT_EQ(after([](auto& c) { c.cache.dtype = DType::bf16; }), "KvCacheSpec::validate dtype");
  // 576 elements of other parts.
  EXPECT_EQ(after([](auto& c) { c.mla->dims = {448, 32, 128, 24}; }),
            "FLASH_ATTN_MLA.make_builder kv_lora_rank");
}

TEST(MlaBadBuilder, GivesTheReasonsOfPrefillBackends) {
  const auto executor = make_thread_pool(1);
  const BuilderConfig good = MlaLayer({}, *executor).builder_config();
  const auto after = [&](const char* prefill, const char* platform, bool quant_output) {
    BuilderConfig c = good;
    c.mla->prefill_backend = prefill;
    c.mla->platform = Platform::parse(platform);
    c.mla->quant_output = quant_output;
    return refusal([&] { (void)mla().make_builder(c); });
  };
  EXPECT_EQ(after("ROCM_AITER_FA", "rocm:gfx942", false), "accepted");
  EXPECT_EQ(after("ROCM_AITER_FA", "rocm:gfx942", true),
            "Unsupported: ROCM_AITER_FA: [fused quantised output not supported]");
  EXPECT_EQ(after("ROCM_AITER_FA", "cpu", true),
            "Unsupported: ROCM_AITER_FA: [fused quantised output not supported]");
  EXPECT_EQ(after("FLASH_ATTN", "cuda:9.0", true),
            "Unsupported: FLASH_ATTN: [fused quantised output not supported: cuda:9.0 (must be "
            "cpu)]");
  EXPECT_EQ(after("FLASH_ATTN", "cpu", true), "accepted");
  EXPECT_THAT(after("NONE", "cpu", false), HasSubstr("find_mla_prefill_backend"));
}

TEST(MlaBadImpl, NamesTheField) {
  const auto executor = make_thread_pool(1);
  const ImplConfig good = MlaLayer({}, *executor).impl_config();
  const auto after = [&](const std::function<void(ImplConfig&)>& change) {
    ImplConfig c = good;
    change(c);
    return refusal([&] { (void)mla().make_impl(c); });
  };
  EXPECT_EQ(after([](auto&) {}), "accepted");
  const BadConfig<ImplConfig> bad[] = {
      {"mla", [](auto& c) { c.mla.reset(); }},
      {"mla", [](auto& c) { c.mla->weights.reset(); }},
      {"dtype", [](auto& c) { c.dtype = DType::i8; }},
      {"mla.weights", [](auto& c) { c.dtype = DType::f16; }},
      {"mla.weights", [](auto& c) { c.num_q_heads = 4; }},
      {"num_q_heads", [](auto& c) { c.num_q_heads = 0; }},
      {"num_kv_heads", [](auto& c) { c.num_kv_heads = 3; }},
      {"head_size", [](auto& c) { c.head_size = 48; }},
      {"softcap", [](auto& c) { c.softcap = 30.0F; }},
      {"sliding_window", [](auto& c) { c.sliding_window = 4096; }},
      {"alibi_slopes", [](auto& c) { c.alibi_slopes = {1.0F, 1.0F, 1.0F}; }},
      {"sinks", [](auto& c) { c.sinks = {1.0F, 1.0F, 1.0F}; }},
      {"v_scale", [](auto& c) { c.v_scale = {1.0F}; }},
      {"value_scales", [](auto& c) { c.value_scales = {1.0F}; }},
      {"shares_kv_cache", [](auto& c) { c.shares_kv_cache = true; }},
      {"attn_type", [](auto& c) { c.attn_type = AttentionType::encoder_only; }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "f16"; }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "int8_level1"; }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "u8"; }},
      {"kv_cache_dtype", [](auto& c) { c.kv_cache_dtype = "nothing"; }},
      {"kv_lora_rank", [](auto& c) { c.kv_cache_dtype = "fp8_ds_mla"; }},
      {"scale", [](auto& c) { c.scale = 0.0F; }},
      {"scale", [](auto& c) { c.scale = kNan; }},
      {"k_scale", [](auto& c) { c.k_scale = {1.0F}; }},
  };
  for (const auto& b : bad)
    EXPECT_EQ(after(b.change), std::string("FLASH_ATTN_MLA.make_impl ") + b.argument);
  for (const std::vector<float>& scales :
       {std::vector{1.0F, 1.0F}, {0.0F}, {-1.0F}, {kInf}, {kNan}}) {
    EXPECT_EQ(after([&](auto& c) {
                c.kv_cache_dtype = "fp8_e4m3";
                c.k_scale = scales;
              }),
              "FLASH_ATTN_MLA.make_impl k_scale");
  }
  EXPECT_THAT(after([](auto& c) { c.mla->prefill_backend = "NONE"; }),
              HasSubstr("find_mla_prefill_backend"));
  EXPECT_THAT(after([](auto& c) {
                c.mla->prefill_backend = "FLASH_ATTN";
                c.mla->platform = Platform::parse("cuda:7.5");
              }),
              HasSubstr("Unsupported: FLASH_ATTN: [compute capability"));
}

TEST(MlaBadBatch, NamesTheField) {
  const auto executor = make_thread_pool(1);
  MlaLayer layer({}, *executor);
  const MlaStep step = layer.prepare({{0, 40, 1}, {1, 300, 20}});
  const auto after = [&](const std::function<void(CommonMetadata&)>& change) {
    CommonMetadata m = step.batch;
    change(m);
    const std::string text = refusal([&] { (void)layer.builder->build(0, m); });
    return text.substr(text.find(' ') + 1);
  };
  EXPECT_EQ(after([](auto&) {}), "accepted");
  const BadConfig<CommonMetadata> bad[] = {
      {"num_reqs", [](auto& m) { m.num_reqs = -1; }},
      {"num_tokens", [](auto& m) { m.num_tokens = -1; }},
      {"query_start_loc", [](auto& m) { m.query_start_loc.pop_back(); }},
      {"query_start_loc", [](auto& m) { m.query_start_loc[0] = 1; }},
      {"query_start_loc", [](auto& m) { m.query_start_loc[1] = -1; }},
      {"query_start_loc", [](auto& m) { m.num_tokens = 20; }},
      {"max_query_len", [](auto& m) { m.max_query_len = 19; }},
      {"seq_lens", [](auto& m) { m.seq_lens[1] = 19; }},
      {"seq_lens", [](auto& m) { m.seq_lens.pop_back(); }},
      {"max_seq_len", [](auto& m) { m.max_seq_len = 319; }},
      {"block_table", [](auto& m) { m.block_table = {}; }},
      {"block_table", [](auto& m) { m.block_table.dtype = DType::i64; }},
      {"block_table", [](auto& m) { m.block_table = m.block_table.select(0, 0); }},
      {"block_table", [](auto& m) { m.block_table = m.block_table.slice(0, 0, 1); }},
      {"block_table", [](auto& m) { m.block_table = m.block_table.slice(1, 0, 19); }},
      {"block_table", [](auto& m) { m.block_table.strides[1] = 2; }},
      {"slot_mapping", [](auto& m) { m.slot_mapping.pop_back(); }},
      {"slot_mapping", [](auto& m) { m.slot_mapping[3] = -2; }},
      {"slot_mapping", [](auto& m) { m.slot_mapping[3] = 6 * 2048; }},
      {"causal", [](auto& m) { m.causal = false; }},
      {"request_causal", [](auto& m) { m.request_causal = {1, 0}; }},
  };
  for (const auto& b : bad) EXPECT_EQ(after(b.change), b.argument);
  EXPECT_EQ(after([](auto& m) { m.request_causal = {1, 1}; }), "accepted");
  EXPECT_EQ(after([](auto& m) { m.slot_mapping.clear(); }), "accepted");
}

TEST(MlaBadBatch, FlagsOfPromptsAreNeededWhereTheyCount) {
  const auto executor = make_thread_pool(1);
  MlaSetup setup;
  setup.decode_threshold = 4;
  MlaLayer layer(setup, *executor);
  MlaStep step = layer.prepare({{0, 40, 1}});
  BuilderConfig config = layer.builder_config();
  config.mla->short_extends_decode = false;
  const auto builder = mla().make_builder(config);
  EXPECT_THAT(refusal([&] { (void)builder->build(0, step.batch); }), EndsWith(" is_prefilling"));
  step.batch.is_prefilling = {0};
  EXPECT_NO_THROW((void)builder->build(0, step.batch));
}

}  // namespace
}  // namespace attend::testing
