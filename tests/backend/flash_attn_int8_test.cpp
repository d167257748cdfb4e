// SPDX-License-Identifier: Apache-2.0
// int8 caches in FLASH_ATTN: what is refused, where, and that a refusal writes nothing. Values and
// cache contents are compared with the oracle by the conformance cases.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int kHeads = 2, kDim = 16, kBlocks = 3, kBlockSize = 16;

const Backend& backend() { return find_backend("FLASH_ATTN"); }

ImplConfig impl_config(KvFormat format) {
  ImplConfig c;
  c.num_q_heads = 4;
  c.num_kv_heads = kHeads;
  c.head_size = kDim;
  c.kv_cache_dtype = to_string(format);
  if (format == KvFormat::int8_level1) c.value_scales.assign(kHeads * kDim, 0.02F);
  return c;
}

KvCacheSpec cache_spec(KvFormat format) {
  KvCacheSpec s;
  s.num_blocks = kBlocks;
  s.block_size = kBlockSize;
  s.num_kv_heads = kHeads;
  s.head_size = kDim;
  s.dtype = DType::i8;
  s.format = format;
  return s;
}

/// A prefill of 20 tokens.
struct Step {
  KvFormat format;
  HostTensor query{DType::bf16, {20, 4, kDim}}, key{DType::bf16, {20, kHeads, kDim}},
      value{DType::bf16, {20, kHeads, kDim}}, output{DType::bf16, {20, 4, kDim}}, cache, scales;
  std::vector<std::int32_t> table{2, 0};
  CommonMetadata batch;
  BuilderConfig builder;
  std::unique_ptr<Metadata> metadata;
  Buffer workspace;
  ForwardArgs args;

  explicit Step(KvFormat f)
      : format(f),
        cache(DType::i8, backend().kv_cache_shape(cache_spec(f))),
        scales(DType::f32, backend().kv_scale_shape(cache_spec(f))) {
    Rng rng(8);
    query.fill_normal(rng);
    key.fill_normal(rng);
    value.fill_normal(rng);
    cache.fill_bytes(0x5a);
    scales.fill_bytes(0x5a);
    output.fill_bytes(0x5a);
    batch.query_start_loc = {0, 20};
    batch.seq_lens = {20};
    batch.num_reqs = 1;
    batch.num_tokens = batch.max_query_len = batch.max_seq_len = 20;
    for (int i = 0; i < 20; ++i) batch.slot_mapping.push_back(table[i / 16] * 16 + i % 16);
    batch.block_table = {table.data(), DType::i32, {1, 2}};
    builder.num_q_heads = 4;
    builder.cache = cache_spec(f);
    builder.num_workers = default_executor().num_workers();
    metadata = backend().make_builder(builder)->build(0, batch);
    workspace = Buffer(metadata->workspace_bytes());
    args.query = query;
    args.key = key;
    args.value = value;
    args.kv_cache = cache;
    args.kv_scale_cache = scales;
    args.output = output;
    args.workspace = workspace.workspace();
  }
  void forward() { backend().make_impl(impl_config(format))->forward(args, metadata.get()); }
};

constexpr KvFormat kFormats[] = {KvFormat::int8_level1, KvFormat::int8_level2,
                                 KvFormat::int8_per_token_head};

TEST(FlashAttnInt8, CachesHaveTheShapesOfTheirFormats) {
  const auto shape = [](KvFormat f) { return backend().kv_cache_shape(cache_spec(f)); };
  const auto scales = [](KvFormat f) { return backend().kv_scale_shape(cache_spec(f)); };
  EXPECT_THAT(shape(KvFormat::int8_level1), ElementsAre(2, 3, 2, 16, 16));
  EXPECT_THAT(shape(KvFormat::int8_level2), ElementsAre(3, 3, 2, 16, 16));
  EXPECT_THAT(shape(KvFormat::int8_per_token_head), ElementsAre(2, 3, 16, 2, 16));
  EXPECT_THAT(scales(KvFormat::int8_level1), ElementsAre(3, 2, 16));
  EXPECT_THAT(scales(KvFormat::int8_level2), ElementsAre(3, 2, 16));
  EXPECT_THAT(scales(KvFormat::int8_per_token_head), ElementsAre(2, 3, 16, 2));
  KvCacheSpec plain = cache_spec(KvFormat::plain);
  plain.dtype = DType::bf16;
  EXPECT_THAT(backend().kv_scale_shape(plain), IsEmpty());
  KvCacheSpec wrong = cache_spec(KvFormat::int8_level2);
  wrong.dtype = DType::bf16;
  EXPECT_THROW(backend().kv_cache_shape(wrong), InvalidArgument);
}

TEST(FlashAttnInt8, SelectionSaysWhatAFormatCannotDo) {
  AttentionConfig c;
  c.platform.type = DeviceType::cpu;
  c.head_size = 128;
  for (const KvFormat f : kFormats) {
    c.kv_cache_dtype = to_string(f);
    EXPECT_THAT(backend().validate_configuration(c), IsEmpty()) << to_string(f);
    AttentionConfig other = c;
    other.attn_type = AttentionType::encoder;
    EXPECT_THAT(backend().validate_configuration(other),
                Contains("quantization is not supported for encoder attention"));
    other = c;
    other.use_per_head_quant_scales = true;
    EXPECT_THAT(backend().validate_configuration(other), Contains(HasSubstr("scales of its own")));
    other = c;
    other.platform = Platform::parse("cuda:9.0");
    EXPECT_THAT(backend().validate_configuration(other), Contains(HasSubstr("CPU only")));
    other = c;
    other.dtype = DType::f32;
    EXPECT_EQ(backend().validate_configuration(other).empty(), f != KvFormat::int8_level2);
  }
}

TEST(FlashAttnInt8, Level1DoesNotStartWithoutItsScales) {
  struct Wrong {
    KvFormat format;
    std::function<void(ImplConfig&)> spoil;
    const char* argument;
  };
  const std::vector<Wrong> cases{
      {KvFormat::int8_level1, [](auto& c) { c.value_scales.clear(); }, "value_scales"},
      {KvFormat::int8_level1, [](auto& c) { c.value_scales.resize(kDim); }, "value_scales"},
      {KvFormat::int8_level1, [](auto& c) { c.value_scales[3] = 0.0F; }, "value_scales"},
      {KvFormat::int8_level1, [](auto& c) { c.value_scales[3] = std::nanf(""); }, "value_scales"},
      {KvFormat::int8_level2, [](auto& c) { c.value_scales.assign(32, 1.0F); }, "value_scales"},
      {KvFormat::int8_level2, [](auto& c) { c.dtype = DType::f32; }, "dtype"},
      {KvFormat::int8_level1, [](auto& c) { c.k_scale = c.v_scale = {1.0F}; }, "k_scale"},
      {KvFormat::int8_level1, [](auto& c) { c.attn_type = AttentionType::encoder; },
       "kv_cache_dtype"},
      {KvFormat::int8_level1, [](auto& c) { c.kv_cache_dtype = "int8_level3"; }, "kv_cache_dtype"},
  };
  for (const Wrong& w : cases) {
    ImplConfig c = impl_config(w.format);
    w.spoil(c);
    try {
      backend().make_impl(c);
      ADD_FAILURE() << w.argument << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), w.argument) << e.what();
    }
  }
}

TEST(FlashAttnInt8, WrongTensorsAreRefusedBeforeAnythingIsWritten) {
  struct Wrong {
    const char* argument;
    std::function<void(Step&)> spoil;
  };
  const std::vector<Wrong> cases{
      {"kv_scale_cache", [](Step& s) { s.args.kv_scale_cache = {}; }},
      {"kv_scale_cache",
       [](Step& s) { s.args.kv_scale_cache = s.args.kv_scale_cache.slice(0, 0, 1); }},
      {"kv_scale_cache", [](Step& s) { s.args.kv_scale_cache.dtype = DType::i32; }},
      {"kv_scale_cache", [](Step& s) { s.args.kv_scale_cache.data = s.args.kv_cache.data; }},
      {"kv_cache", [](Step& s) { s.args.kv_cache = s.args.kv_cache.slice(0, 0, 1); }},
      {"kv_cache", [](Step& s) { s.args.kv_cache.dtype = DType::u8; }},
      {"workspace", [](Step& s) { s.args.workspace.size -= 64; }},
      {"block_table", [](Step& s) { s.table[1] = 3; }},
  };
  for (const KvFormat f : kFormats) {
    for (const Wrong& w : cases) {
      SCOPED_TRACE(std::string(to_string(f)) + " " + w.argument);
      Step s(f);
      // Without a level's scratch a smaller workspace is the plan's to refuse.
      if (f == KvFormat::int8_per_token_head && std::string(w.argument) == "workspace")
        s.args.workspace.size = 64;
      w.spoil(s);
      const auto cache = s.cache.snapshot(), scales = s.scales.snapshot();
      const auto output = s.output.snapshot();
      try {
        s.forward();
        ADD_FAILURE() << "accepted";
      } catch (const InvalidArgument& e) {
        EXPECT_EQ(e.argument(), w.argument) << e.what();
      }
      EXPECT_EQ(s.cache.snapshot(), cache);
      EXPECT_EQ(s.scales.snapshot(), scales);
      EXPECT_EQ(s.output.snapshot(), output);
    }
  }
}

TEST(FlashAttnInt8, MetadataOfAnotherFormatIsRefused) {
  Step s(KvFormat::int8_level1);
  Step other(KvFormat::int8_per_token_head);
  s.metadata = std::move(other.metadata);
  EXPECT_THROW(s.forward(), InvalidArgument);
}

TEST(FlashAttnInt8, AValueThatIsNoNumberIsRefusedByLevel1) {
  Step s(KvFormat::int8_level1);
  s.value.as<bf16>()[5] = to_bf16(std::nanf(""));
  const auto cache = s.cache.snapshot();
  EXPECT_THROW(s.forward(), InvalidArgument);
  EXPECT_EQ(s.cache.snapshot(), cache);
}

}  // namespace
}  // namespace attend::testing
