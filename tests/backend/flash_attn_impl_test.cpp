// SPDX-License-Identifier: Apache-2.0
// Builder and impl together against the oracle.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attend/backend/selector.h"
#include "backend/allocation_counter.h"
#include "backend/flash_attn_step.h"

namespace attend {
namespace {

using testing::Step;
using testing::StepOptions;

struct Variant {
  std::string label;
  StepOptions options;
};
void PrintTo(const Variant& v, std::ostream* os) { *os << v.label; }

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    StepOptions o;
    o.dtype = dtype;
    all.push_back({std::string(to_string(dtype)), o});
  }
  const auto add = [&](const char* label, auto change) {
    StepOptions o;
    change(o);
    all.push_back({label, o});
  };
  add("hnd", [](auto& o) { o.layout = KvLayout::hnd; });
  add("nhd_layers", [](auto& o) { o.num_layers = 3; });
  add("hnd_layers", [](auto& o) {
    o.layout = KvLayout::hnd;
    o.num_layers = 3;
  });
  add("block_48", [](auto& o) { o.block_size = 48; });
  add("no_padding", [](auto& o) { o.padding = 0; });
  add("zero_length_queries", [](auto& o) {
    o.query_lens = {1, 0, 7, 0};
    o.context_lens = {12, 30, 0, 0};
  });
  add("many_pieces", [](auto& o) {
    o.query_lens = {1, 300};
    o.context_lens = {1100, 290};
  });
  add("window", [](auto& o) { o.sliding_window = 9; });
  add("softcap_alibi", [](auto& o) {
    o.softcap = 5.0F;
    o.alibi_slopes = {0.5F, 0.25F, 0.125F, 0.0625F};
  });
  add("non_causal", [](auto& o) { o.causal = false; });
  add("causal_by_request", [](auto& o) { o.request_causal = {1, 0, 1}; });
  add("window_causal_by_request", [](auto& o) {
    o.request_causal = {1, 0, 0};
    o.sliding_window = 6;
  });
  const auto encoder = [](auto& o) {
    o.attn_type = AttentionType::encoder;
    o.context_lens = {0, 0, 0};
  };
  add("encoder", encoder);
  add("encoder_only_window", [&](auto& o) {
    encoder(o);
    o.attn_type = AttentionType::encoder_only;
    o.sliding_window = 4;
  });
  add("encoder_is_never_causal", [&](auto& o) {
    encoder(o);
    o.request_causal = {1, 1, 1};
  });
  add("encoder_only_is_never_causal", [&](auto& o) {
    encoder(o);
    o.attn_type = AttentionType::encoder_only;
    o.request_causal = {1, 1, 1};
    o.sliding_window = 11;
  });
  add("encoder_only_wide_window", [&](auto& o) {
    encoder(o);
    o.attn_type = AttentionType::encoder_only;
    o.query_lens = {300, 64, 1};
    o.sliding_window = 70;
  });
  return all;
}

class FlashAttnRoundTrip : public ::testing::TestWithParam<Variant> {};

TEST_P(FlashAttnRoundTrip, MatchesTheOracleAndFillsTheCache) {
  Step step(GetParam().options);
  step.run();
  step.expect_oracle();
  if (!step.is_encoder()) step.expect_cache();
}

INSTANTIATE_TEST_SUITE_P(All, FlashAttnRoundTrip, ::testing::ValuesIn(variants()),
                         [](const auto& info) { return info.param.label; });

TEST(FlashAttnForward, LayoutsGiveTheSameBits) {
  Step plain({});
  plain.run();
  for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
    for (const int num_layers : {0, 2}) {
      for (const int num_workers : {1, 2}) {
        StepOptions o;
        o.layout = layout;
        o.num_layers = num_layers;
        o.num_workers = num_workers;
        Step other(o);
        other.run();
        EXPECT_EQ(other.output.snapshot(), plain.output.snapshot());
        EXPECT_EQ(other.lse.snapshot(), plain.lse.snapshot());
      }
    }
  }
}

TEST(FlashAttnForward, CommonPrefixChangesNothing) {
  StepOptions o;
  o.context_lens = {70, 33, 20};
  Step flat(o), cascade(o);
  flat.run();
  const auto metadata = cascade.build(16);
  find_backend("FLASH_ATTN")
      .make_impl(cascade.impl_config)
      ->forward(cascade.forward_args(), metadata.get());
  EXPECT_EQ(cascade.output.snapshot(), flat.output.snapshot());
}

TEST(FlashAttnForward, WithoutKeysReadsWhatIsInTheCache) {
  Step step({});
  step.run();
  const auto first = step.output.snapshot();
  const auto cache = step.cache_memory.snapshot();
  step.output.fill_bytes(0xFF);
  const auto metadata = step.build();
  ForwardArgs args = step.forward_args();
  args.key = args.value = {};
  find_backend("FLASH_ATTN").make_impl(step.impl_config)->forward(args, metadata.get());
  EXPECT_EQ(step.output.snapshot(), first);
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
}

TEST(FlashAttnForward, WithoutSlotsWritesNothing) {
  Step step({});
  step.run();
  const auto first = step.output.snapshot();
  const auto cache = step.cache_memory.snapshot();
  step.batch.slot_mapping.clear();
  step.key.fill_bytes(0);
  step.run();
  EXPECT_EQ(step.output.snapshot(), first);
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
}

TEST(FlashAttnForward, UpdatedBlockTableIsTheOneThatIsUsed) {
  Step step({}), moved({});
  step.run();
  // The second group holds the same tokens in blocks in the opposite order.
  const std::int64_t last = moved.builder_config.cache.num_blocks - 1;
  const auto builder = find_backend("FLASH_ATTN").make_builder(moved.builder_config);
  const auto first = builder->build(0, moved.batch);
  const testing::HostTensor& old_table = moved.block_table;
  testing::HostTensor table(DType::i32, {old_table.view().shape[0], old_table.view().shape[1]});
  for (std::size_t i = 0; i < table.as<std::int32_t>().size(); ++i) {
    const std::int32_t block = old_table.as<std::int32_t>()[i];
    table.as<std::int32_t>()[i] = block <= last ? static_cast<std::int32_t>(last) - block : block;
  }
  testing::HostTensor swapped(moved.options.dtype,
                              flash_attn_cache_shape(moved.builder_config.cache));
  for (std::int64_t b = 0; b <= last; ++b) {
    for (int plane = 0; plane < 2; ++plane) {
      const ConstTensorView from = moved.cache.select(0, plane).select(0, b);
      std::memcpy(swapped.view().select(0, plane).select(0, last - b).data, from.data,
                  static_cast<std::size_t>(from.numel()) * size_of(from.dtype));
    }
  }
  std::vector<std::int64_t> slots;
  for (std::int64_t slot : moved.batch.slot_mapping) {
    slots.push_back(slot < 0 ? slot : (last - slot / 16) * 16 + slot % 16);
  }
  const auto second = builder->update_block_table(*first, table, slots);
  moved.cache = swapped;
  moved.workspace.reserve(second->workspace_bytes());
  find_backend("FLASH_ATTN")
      .make_impl(moved.impl_config)
      ->forward(moved.forward_args(), second.get());
  EXPECT_EQ(moved.output.snapshot(), step.output.snapshot());
}

TEST(FlashAttnForward, ProfilingRunFillsTheOutput) {
  Step step({});
  find_backend("FLASH_ATTN").make_impl(step.impl_config)->forward(step.forward_args(), nullptr);
  for (const unsigned char byte : step.output.snapshot()) ASSERT_EQ(byte, 0);
  for (const float x : step.lse.as<float>()) ASSERT_EQ(x, -INFINITY);
}

TEST(FlashAttnForward, DoesNotAllocate) {
  StepOptions o;
  o.query_lens = {1, 1};
  o.context_lens = {127, 700};
  o.dtype = DType::bf16;
  Step step(o);
  const auto metadata = step.build();
  const auto impl = find_backend("FLASH_ATTN").make_impl(step.impl_config);
  const ForwardArgs args = step.forward_args();
  impl->forward(args, metadata.get());  // threads start here
  const std::size_t before = testing::num_allocations();
  impl->forward(args, metadata.get());
  EXPECT_EQ(testing::num_allocations(), before);
}

TEST(AllocationCounter, SeesAllocations) {
  const std::size_t before = testing::num_allocations();
  const auto p = std::make_unique<std::vector<int>>(100);
  EXPECT_GE(testing::num_allocations(), before + 2);
}

}  // namespace
}  // namespace attend
