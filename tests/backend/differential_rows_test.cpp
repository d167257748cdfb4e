// SPDX-License-Identifier: Apache-2.0
// Whole prompts attend to rows of key and value where the cache does not have them.
#include <gmock/gmock.h>

#include <algorithm>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "backend/differential_step.h"

namespace attend {
namespace {

using testing::as_differential;
using testing::DifferentialOptions;
using testing::DifferentialStep;
using ::testing::HasSubstr;

DifferentialOptions prompts() {
  DifferentialOptions o;
  o.query_lens = {40, 7, 300};
  o.context_lens = {0, 0, 0};
  o.dtype = DType::bf16;
  return o;
}

/// Takes the slots of tokens that no later query sees.
void leave_out_hidden(DifferentialStep& step, int window) {
  for (int r = 0; r < step.num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    for (int t = 0; t < step.options.query_lens[i] - window; ++t)
      step.batch.slot_mapping[static_cast<std::size_t>(step.batch.query_start_loc[i] + t)] = -1;
  }
}

void expect_refused(DifferentialStep& step, const std::string& argument, const std::string& got) {
  const auto cache = step.cache_memory.snapshot(), output = step.output.snapshot();
  const auto metadata = step.build();
  try {
    step.forward(*metadata);
    ADD_FAILURE() << "accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.op(), "DIFFERENTIAL_FLASH_ATTN.forward");
    EXPECT_EQ(e.argument(), argument) << e.what();
    EXPECT_THAT(e.what(), HasSubstr(got));
  }
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
  EXPECT_EQ(step.output.snapshot(), output);
}

TEST(DifferentialRows, WindowedPromptsLeaveHiddenKeysOutOfTheCache) {
  for (const auto variant : {DifferentialVariant::v1, DifferentialVariant::v2}) {
    DifferentialOptions o = prompts();
    o.variant = variant;
    o.sliding_window = 20;
    DifferentialStep all(o), some(o);
    all.run();
    all.expect_oracle();
    leave_out_hidden(some, 20);
    EXPECT_TRUE(as_differential(*some.build()).is_pure_prefill());
    some.run();
    EXPECT_EQ(some.output.snapshot(), all.output.snapshot());
    EXPECT_EQ(some.lse.snapshot(), all.lse.snapshot());
    const auto is_empty = [&](int request, int token) {
      const ConstTensorView row = some.cache_row(0, some.slot(request, token), 0);
      const auto* bytes = row.as<unsigned char>();
      return std::all_of(bytes, bytes + 2 * o.head_size, [](auto b) { return b == 0xFF; });
    };
    EXPECT_TRUE(is_empty(0, 19));
    EXPECT_FALSE(is_empty(0, 20));
    EXPECT_TRUE(is_empty(2, 279));
    EXPECT_FALSE(is_empty(1, 0));
  }
}

TEST(DifferentialRows, HaveTheBitsOfTheCacheWithPrefixesThatTheTableShares) {
  DifferentialOptions o = prompts();
  o.query_lens = {310, 300};
  o.context_lens = {0, 0};
  o.shared_keys = 288;
  DifferentialStep cached(o), rows(o);
  cached.builder_config.cascade = rows.builder_config.cascade = CascadeMode::always;
  EXPECT_FALSE(as_differential(*cached.build()).cascade.prefixes.empty());
  cached.run();
  std::fill(rows.batch.slot_mapping.begin(), rows.batch.slot_mapping.end(), -1);
  const auto cache = rows.cache_memory.snapshot();
  rows.run();
  EXPECT_EQ(rows.output.snapshot(), cached.output.snapshot());
  EXPECT_EQ(rows.lse.snapshot(), cached.lse.snapshot());
  EXPECT_EQ(rows.cache_memory.snapshot(), cache);
}

TEST(DifferentialRows, ProfilingNeedsNeitherCacheNorTable) {
  DifferentialStep cached(prompts());
  cached.run();
  for (const bool empty : {true, false}) {
    DifferentialStep step(prompts());
    step.batch.block_table = {};
    step.batch.slot_mapping.assign(step.batch.slot_mapping.size(), -1);
    const auto metadata = step.build();
    step.workspace.reserve(metadata->workspace_bytes());
    ForwardArgs args = step.forward_args();
    args.kv_cache = empty ? step.cache.slice(2, 0, 0) : TensorView();
    find_backend("DIFFERENTIAL_FLASH_ATTN")
        .make_impl(step.impl_config)
        ->forward(args, metadata.get());
    EXPECT_EQ(step.output.snapshot(), cached.output.snapshot());
    EXPECT_EQ(step.lse.snapshot(), cached.lse.snapshot());
  }
}

TEST(DifferentialRows, TokensWithoutSlotAreRefusedWhereTheCacheIsRead) {
  DifferentialOptions o;  // with computed tokens
  DifferentialStep mixed(o);
  mixed.batch.slot_mapping[4] = -1;
  expect_refused(mixed, "slot_mapping", "got -1 at index 4");

  o = prompts();
  o.kv_cache_dtype = "fp8_e4m3";
  DifferentialStep fp8(o);
  fp8.batch.slot_mapping[41] = -1;
  expect_refused(fp8, "slot_mapping", "got -1 at index 41");

  // A producer's slots are no business of the layers that share its cache.
  DifferentialStep producer({}), shared({});
  producer.run();
  shared.cache = producer.cache;
  shared.impl_config.shares_kv_cache = true;
  shared.batch.slot_mapping[4] = -1;
  shared.run();
  EXPECT_EQ(shared.output.snapshot(), producer.output.snapshot());
}

TEST(DifferentialRows, OnlyWholePromptsRunWithoutACacheOrATable) {
  DifferentialStep decode({});
  decode.cache = {};
  expect_refused(decode, "kv_cache", "got no cache");
  DifferentialStep shared(prompts());
  shared.cache = {};
  shared.impl_config.shares_kv_cache = true;
  expect_refused(shared, "kv_cache", "shares_kv_cache");
  DifferentialStep no_table(prompts());
  no_table.batch.block_table = {};
  no_table.impl_config.shares_kv_cache = true;
  expect_refused(no_table, "metadata", "block table");
  DifferentialStep context({});
  context.batch.block_table = {};
  EXPECT_THROW(context.build(), InvalidArgument);
}

}  // namespace
}  // namespace attend
