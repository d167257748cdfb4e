// SPDX-License-Identifier: Apache-2.0
// Decodes of several tokens (speculative and multi-token prediction).
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "backend/flash_attn_step.h"

namespace attend {
namespace {

using testing::Step;
using testing::StepOptions;
using testing::StepPart;

constexpr int kSpeculative = 4;

/// Ragged decodes up to the threshold, at contexts around the ends of blocks and pieces.
StepOptions ragged_decodes() {
  StepOptions o;
  o.query_lens = {5, 1, 3, 2, 4, 5};
  o.context_lens = {70, 15, 254, 16, 1021, 1};
  o.padding = 0;
  return o;
}

struct Variant {
  std::string label;
  void (*change)(StepOptions&);
};
void PrintTo(const Variant& v, std::ostream* os) { *os << v.label; }

class MultiTokenDecode : public ::testing::TestWithParam<Variant> {
 protected:
  Step make_step() const {
    StepOptions o = ragged_decodes();
    GetParam().change(o);
    Step step(o);
    step.builder_config.num_speculative_tokens = kSpeculative;
    return step;
  }
};

TEST_P(MultiTokenDecode, HasTheBitsOfSingleSteps) {
  Step whole = make_step();
  std::vector<StepPart> all;
  for (int r = 0; r < whole.num_reqs(); ++r) {
    all.push_back({r, 0, whole.options.query_lens[static_cast<std::size_t>(r)]});
  }
  EXPECT_EQ(whole.run_parts(all), (DecodePrefillSplit{6, 0, 20, 0}));
  whole.expect_oracle();
  whole.expect_cache();

  Step single = make_step();
  for (int t = 0; t <= kSpeculative; ++t) {
    std::vector<StepPart> parts;
    for (const StepPart& p : all) {
      if (t < p.end) parts.push_back({p.request, t, t + 1});
    }
    single.run_parts(parts);
  }
  EXPECT_EQ(single.output.snapshot(), whole.output.snapshot());
  EXPECT_EQ(single.lse.snapshot(), whole.lse.snapshot());
}

TEST_P(MultiTokenDecode, RejectedDraftsLeaveNoTrace) {
  Step step = make_step();
  // Drafts with other keys; all but the first token of each are rejected.
  std::vector<StepPart> drafts, all;
  for (int r = 0; r < step.num_reqs(); ++r) {
    const int len = step.options.query_lens[static_cast<std::size_t>(r)];
    if (len > 1) drafts.push_back({r, 1, len});
    all.push_back({r, 0, len});
  }
  step.run_parts(drafts, 99);
  step.run_parts(all);
  step.expect_oracle();
  step.expect_cache();
}

INSTANTIATE_TEST_SUITE_P(
    All, MultiTokenDecode,
    ::testing::Values(Variant{"f32", [](auto&) {}},
                      Variant{"bf16", [](auto& o) { o.dtype = DType::bf16; }},
                      Variant{"f16_group_of_5",
                              [](auto& o) {
                                o.dtype = DType::f16;
                                o.num_q_heads = 10;
                              }},
                      Variant{"window_1", [](auto& o) { o.sliding_window = 1; }},
                      Variant{"window_3", [](auto& o) { o.sliding_window = 3; }},
                      Variant{"window_across_pieces", [](auto& o) { o.sliding_window = 300; }},
                      Variant{"softcap_alibi",
                              [](auto& o) {
                                o.softcap = 5.0F;
                                o.alibi_slopes = {0.5F, 0.25F, 0.125F, 0.0625F};
                              }},
                      Variant{"one_worker", [](auto& o) { o.num_workers = 1; }}),
    [](const auto& info) { return info.param.label; });

TEST(MultiTokenSplit, RowsOverTheThresholdAndAllBehindThemArePrefills) {
  StepOptions o = ragged_decodes();
  o.query_lens = {5, 1, 6, 2, 4, 5};
  o.context_lens = {70, 15, 254, 16, 1021, 1};
  Step step(o);
  step.builder_config.num_speculative_tokens = kSpeculative;
  EXPECT_EQ(step.run_parts({{0, 0, 5}, {1, 0, 1}, {2, 0, 6}, {3, 0, 2}, {4, 0, 4}, {5, 0, 5}}),
            (DecodePrefillSplit{2, 4, 6, 17}));
  step.expect_oracle();
  Step first_too_long(o);
  first_too_long.builder_config.num_speculative_tokens = 0;
  EXPECT_EQ(first_too_long.run_parts({{0, 0, 5}, {1, 0, 1}}), (DecodePrefillSplit{0, 2, 0, 6}));
  EXPECT_EQ(first_too_long.run_parts({{1, 0, 1}, {0, 0, 5}}), (DecodePrefillSplit{1, 1, 1, 5}));
}

}  // namespace
}  // namespace attend
