// SPDX-License-Identifier: Apache-2.0
// Cross attention: queries of the decoder over cached keys of the encoder.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/core/error.h"
#include "backend/flash_attn_step.h"
#include "backends/flash_attn/metadata.h"

namespace attend {
namespace {

using testing::Step;
using testing::StepOptions;

/// Three requests with other numbers of encoder keys than of decoder tokens; the second and the
/// third bring theirs in this step.
StepOptions cross() {
  StepOptions o;
  o.attn_type = AttentionType::encoder_decoder;
  o.encoder_lens = {37, 150, 9};
  o.new_encoder = {0, 1, 1};
  return o;
}

void run_and_compare(const StepOptions& options) {
  Step step(options);
  step.run();
  step.expect_oracle();
  step.expect_cache();
}

struct Change {
  std::string label;
  void (*change)(StepOptions&);
};
void PrintTo(const Change& c, std::ostream* os) { *os << c.label; }

class FlashAttnCross : public ::testing::TestWithParam<Change> {};

TEST_P(FlashAttnCross, MatchesTheOracleAndFillsTheCache) {
  StepOptions o = cross();
  GetParam().change(o);
  run_and_compare(o);
}

INSTANTIATE_TEST_SUITE_P(
    All, FlashAttnCross,
    ::testing::Values(
        Change{"plain", [](auto&) {}}, Change{"f16", [](auto& o) { o.dtype = DType::f16; }},
        Change{"bf16_hnd",
               [](auto& o) {
                 o.dtype = DType::bf16;
                 o.layout = KvLayout::hnd;
               }},
        Change{"layers", [](auto& o) { o.num_layers = 2; }},
        Change{"softcap", [](auto& o) { o.softcap = 3.0F; }},
        // A batch made for the decoder's own layers says causal: cross attention never is.
        Change{"causal_by_request", [](auto& o) { o.request_causal = {1, 1, 1}; }},
        Change{"all_new_without_padding",
               [](auto& o) {
                 o.new_encoder = {1, 1, 1};
                 o.padding = 0;
               }},
        Change{"none_new_without_padding",
               [](auto& o) {
                 o.new_encoder = {0, 0, 0};
                 o.padding = 0;
               }},
        Change{"request_without_encoder", [](auto& o) { o.encoder_lens = {37, 0, 9}; }},
        Change{"request_without_query", [](auto& o) { o.query_lens = {1, 0, 40}; }},
        // Fewer keys than queries, and far more keys than the decoder has tokens.
        Change{"audio",
               [](auto& o) {
                 o.query_lens = {1, 4, 1};
                 o.context_lens = {0, 0, 200};
                 o.encoder_lens = {1500, 3, 1500};
               }}),
    [](const auto& info) { return info.param.label; });

TEST(FlashAttnCrossAttention, DecodeReadsWhatAnEarlierStepWrote) {
  StepOptions all_new = cross();
  all_new.new_encoder = {1, 1, 1};
  Step first(all_new);
  first.run();
  const auto cache = first.cache_memory.snapshot();
  // The same queries again, now without keys.
  const auto output = first.output.snapshot();
  first.output.fill_bytes(0xFF);
  first.batch.encoder_slot_mapping.clear();
  const auto metadata = first.build();
  ForwardArgs args = first.forward_args();
  args.key = args.value = {};
  const auto impl = find_backend("FLASH_ATTN").make_impl(first.impl_config);
  impl->forward(args, metadata.get());
  EXPECT_EQ(first.output.snapshot(), output);
  EXPECT_EQ(first.cache_memory.snapshot(), cache);
}

TEST(FlashAttnCrossAttention, ARowDoesNotDependOnHowTheDecoderWasChunked) {
  StepOptions whole = cross();
  whole.query_lens = {12};
  whole.context_lens = {0};
  whole.encoder_lens = {210};
  whole.new_encoder = {0};
  whole.padding = 0;
  Step at_once(whole);
  at_once.run();
  const auto expected = at_once.output.snapshot();
  const std::size_t row_bytes = expected.size() / 12;
  for (int t = 0; t < 12; ++t) {
    Step one(whole);
    one.batch.query_start_loc = {0, 1};
    one.batch.seq_lens = {t + 1};
    one.batch.num_tokens = 1;
    const auto metadata = one.build();
    ForwardArgs args = one.forward_args();
    args.query = args.query.slice(0, t, 1);
    args.output = args.output.slice(0, t, 1);
    args.lse = args.lse.slice(0, t, 1);
    find_backend("FLASH_ATTN").make_impl(one.impl_config)->forward(args, metadata.get());
    const auto got = one.output.snapshot();
    for (std::size_t i = 0; i < got.size(); ++i) {
      const bool own_row = i / row_bytes == static_cast<std::size_t>(t);
      ASSERT_EQ(got[i], own_row ? expected[i] : 0xFF) << "token " << t << ", byte " << i;
    }
  }
}

TEST(FlashAttnCrossAttention, EncoderRowsWithoutAnyQueryAreWritten) {
  StepOptions o = cross();
  o.query_lens = {0, 0, 0};
  run_and_compare(o);
}

TEST(FlashAttnCrossAttention, UpdatedTableTakesEncoderSlots) {
  Step step(cross());
  const auto builder = find_backend("FLASH_ATTN").make_builder(step.builder_config);
  const auto first = builder->build(0, step.batch);
  const std::size_t rows = step.batch.encoder_slot_mapping.size();
  const auto& m = dynamic_cast<const flash_attn::FlashAttnMetadata&>(*first);
  EXPECT_EQ(m.num_new_keys, static_cast<int>(rows));
  const std::vector<std::int64_t> slots(rows, 5);
  const auto second = builder->update_block_table(*first, step.block_table, slots);
  EXPECT_EQ(dynamic_cast<const flash_attn::FlashAttnMetadata&>(*second).slot_mapping, slots);
  EXPECT_THROW(
      builder->update_block_table(*first, step.block_table, std::span(slots).first(rows - 1)),
      InvalidArgument);
}

TEST(FlashAttnCrossAttention, RefusesBadBatches) {
  struct Bad {
    const char* argument;
    void (*change)(Step&);
  };
  for (const Bad& bad : {
           Bad{"encoder_seq_lens", [](Step& s) { s.batch.encoder_seq_lens.clear(); }},
           Bad{"encoder_seq_lens", [](Step& s) { s.batch.encoder_seq_lens.resize(2); }},
           Bad{"encoder_seq_lens", [](Step& s) { s.batch.encoder_seq_lens[1] = -1; }},
           Bad{"block_table", [](Step& s) { s.batch.encoder_seq_lens[1] = 12 * 16 + 1; }},
           Bad{"encoder_slot_mapping", [](Step& s) { s.batch.encoder_slot_mapping[2] = -2; }},
           Bad{"encoder_slot_mapping",
               [](Step& s) {
                 s.batch.encoder_slot_mapping[2] = s.builder_config.cache.num_blocks * 16;
               }},
       }) {
    Step step(cross());
    bad.change(step);
    try {
      step.build();
      ADD_FAILURE() << "no exception for a bad " << bad.argument;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), bad.argument) << e.what();
    }
  }
}

TEST(FlashAttnCrossAttention, TooFewKeyRowsAreRefusedBeforeAnythingIsWritten) {
  Step step(cross());
  const auto metadata = step.build();
  ForwardArgs args = step.forward_args();
  args.value = args.value.slice(0, 0, args.value.shape[0] - 1);
  const auto cache = step.cache_memory.snapshot();
  EXPECT_THROW(
      find_backend("FLASH_ATTN").make_impl(step.impl_config)->forward(args, metadata.get()),
      InvalidArgument);
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
}

}  // namespace
}  // namespace attend
