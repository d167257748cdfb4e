// SPDX-License-Identifier: Apache-2.0
// Whatever is wrong with a call, nothing is written.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "backend/flash_attn_step.h"

namespace attend {
namespace {

using testing::Step;
using testing::StepOptions;

struct BadCall {
  const char* label;
  std::function<void(Step&, ForwardArgs&)> change;
};
void PrintTo(const BadCall& b, std::ostream* os) { *os << b.label; }

class FlashAttnBadCall : public ::testing::TestWithParam<BadCall> {};

TEST_P(FlashAttnBadCall, ThrowsAndWritesNothing) {
  Step step({});
  const auto metadata = step.build();
  const auto impl = find_backend("FLASH_ATTN").make_impl(step.impl_config);
  ForwardArgs args = step.forward_args();
  GetParam().change(step, args);
  const auto output = step.output.snapshot();
  const auto lse = step.lse.snapshot();
  const auto cache = step.cache_memory.snapshot();
  EXPECT_THROW(impl->forward(args, metadata.get()), InvalidArgument);
  EXPECT_EQ(step.output.snapshot(), output);
  EXPECT_EQ(step.lse.snapshot(), lse);
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
}

INSTANTIATE_TEST_SUITE_P(
    All, FlashAttnBadCall,
    ::testing::Values(
        BadCall{"query_undefined", [](auto&, auto& a) { a.query = {}; }},
        BadCall{"query_rank", [](auto&, auto& a) { a.query = a.query.select(1, 0); }},
        BadCall{"query_rows", [](auto&, auto& a) { a.query.shape[0] = 45; }},
        BadCall{"query_heads", [](auto&, auto& a) { a.query.shape[1] = 3; }},
        BadCall{"query_head_size", [](auto&, auto& a) { a.query.shape[2] = 8; }},
        BadCall{"query_dtype", [](auto&, auto& a) { a.query.dtype = DType::i32; }},
        BadCall{"query_stride", [](auto&, auto& a) { a.query.strides[2] = 2; }},
        BadCall{"query_device", [](auto&, auto& a) { a.query.device.type = DeviceType::cuda; }},
        BadCall{"query_is_output", [](auto&, auto& a) { a.query = a.output; }},
        BadCall{"key_undefined", [](auto&, auto& a) { a.key = {}; }},
        BadCall{"value_undefined", [](auto&, auto& a) { a.value = {}; }},
        BadCall{"key_heads", [](auto&, auto& a) { a.key.shape[1] = 1; }},
        BadCall{"key_rows", [](auto&, auto& a) { a.key.shape[0] = 45; }},
        BadCall{"value_head_size", [](auto&, auto& a) { a.value.shape[2] = 8; }},
        BadCall{"value_stride", [](auto&, auto& a) { a.value.strides[2] = 2; }},
        BadCall{"cache_undefined", [](auto&, auto& a) { a.kv_cache = {}; }},
        BadCall{"cache_dtype", [](auto&, auto& a) { a.kv_cache.dtype = DType::i32; }},
        BadCall{"cache_one_plane", [](auto&, auto& a) { a.kv_cache.shape[0] = 1; }},
        BadCall{"cache_block_size", [](auto&, auto& a) { a.kv_cache.shape[2] = 8; }},
        BadCall{"cache_heads", [](auto&, auto& a) { a.kv_cache.shape[3] = 1; }},
        BadCall{"cache_stride", [](auto&, auto& a) { a.kv_cache.strides[4] = 2; }},
        BadCall{"cache_blocks_missing", [](auto&, auto& a) { a.kv_cache.shape[1] = 4; }},
        BadCall{"cache_planes_alias", [](auto&, auto& a) { a.kv_cache.strides[0] = 0; }},
        BadCall{"output_undefined", [](auto&, auto& a) { a.output = {}; }},
        BadCall{"output_rows", [](auto&, auto& a) { a.output.shape[0] = a.lse.shape[0] = 45; }},
        BadCall{"output_rows_alias", [](auto&, auto& a) { a.output.strides[0] = 0; }},
        BadCall{"lse_dtype", [](auto&, auto& a) { a.lse.dtype = DType::i32; }},
        BadCall{"lse_rows", [](auto&, auto& a) { a.lse.shape[0] -= 1; }},
        BadCall{"lse_in_output", [](auto&, auto& a) { a.lse.data = a.output.data; }},
        BadCall{"workspace_null", [](auto&, auto& a) { a.workspace = {}; }},
        BadCall{"workspace_small", [](auto&, auto& a) { a.workspace.size -= 1; }},
        BadCall{"block_id_beyond_the_cache",
                [](auto& s, auto&) { s.block_table.template as<std::int32_t>()[4] = 1 << 20; }},
        BadCall{"block_id_negative",
                [](auto& s, auto&) { s.block_table.template as<std::int32_t>()[4] = -1; }},
        BadCall{"output_in_the_cache",
                [](auto& s, auto& a) { a.output.data = s.cache_memory.view().data; }}),
    [](const auto& info) { return std::string(info.param.label); });

TEST(FlashAttnBadMetadata, WorkersOfAnotherExecutor) {
  Step step({});
  const auto metadata = step.build();
  const auto other = make_thread_pool(1);
  ForwardArgs args = step.forward_args();
  args.executor = other.get();
  const auto cache = step.cache_memory.snapshot();
  EXPECT_THROW(
      find_backend("FLASH_ATTN").make_impl(step.impl_config)->forward(args, metadata.get()),
      InvalidArgument);
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
}

struct OtherMetadata final : Metadata {
  std::size_t workspace_bytes() const noexcept override { return 0; }
};

void expect_refused(Step& step, const Metadata& metadata) {
  const auto output = step.output.snapshot();
  const auto cache = step.cache_memory.snapshot();
  try {
    find_backend("FLASH_ATTN").make_impl(step.impl_config)->forward(step.forward_args(), &metadata);
    ADD_FAILURE() << "no exception";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "metadata") << e.what();
  }
  EXPECT_EQ(step.output.snapshot(), output);
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
}

TEST(FlashAttnBadMetadata, OfAnotherBackend) {
  Step step({});
  expect_refused(step, OtherMetadata());
}

TEST(FlashAttnBadMetadata, OfAnotherShape) {
  const std::vector<std::function<void(StepOptions&)>> changes = {
      [](auto& o) { o.num_q_heads = 8; },
      [](auto& o) { o.num_kv_heads = 1; },
      [](auto& o) { o.head_size = 32; },
      [](auto& o) { o.sliding_window = 4; },
      [](auto& o) {
        o.attn_type = AttentionType::encoder;
        o.context_lens = {0, 0, 0};
      },
  };
  for (const auto& change : changes) {
    StepOptions o;
    change(o);
    Step other(o), step({});
    const auto metadata = other.build();
    step.workspace.reserve(metadata->workspace_bytes());
    expect_refused(step, *metadata);
  }
}

TEST(FlashAttnBadMetadata, RightWindowCountsWhereARequestIsNotCausal) {
  StepOptions o;
  o.sliding_window = 4;
  o.request_causal = {1, 1, 0};
  Step step(o);
  step.builder_config.window_right = -1;
  expect_refused(step, *step.build());
  step.batch.request_causal = {1, 1, 1};
  EXPECT_NO_THROW(step.run());
}

}  // namespace
}  // namespace attend
