// SPDX-License-Identifier: Apache-2.0
// Layers without a cache of their own read the one that an earlier layer has written.
#include <gtest/gtest.h>

#include <vector>

#include "attend/backend/selector.h"
#include "backend/flash_attn_step.h"

namespace attend {
namespace {

using testing::Step;
using testing::StepOptions;

StepOptions cross() {
  StepOptions o;
  o.attn_type = AttentionType::encoder_decoder;
  o.encoder_lens = {37, 150, 9};
  o.new_encoder = {0, 1, 1};
  return o;
}

StepOptions windowed() {
  StepOptions o;
  o.sliding_window = 9;
  return o;
}

TEST(FlashAttnSharedCache, GivesTheBitsOfTheOwnerAndWritesNothing) {
  for (const StepOptions& options : {StepOptions{}, windowed(), cross()}) {
    SCOPED_TRACE(to_string(options.attn_type));
    Step step(options);
    step.run();
    const auto cache = step.cache_memory.snapshot();
    const auto output = step.output.snapshot(), lse = step.lse.snapshot();

    ImplConfig shared = step.impl_config;
    shared.shares_kv_cache = true;
    const auto impl = find_backend("FLASH_ATTN").make_impl(shared);
    const auto metadata = step.build();
    // Its own projections, if it is given any, are of no interest: here all NaN.
    step.key.fill_bytes(0xFF);
    step.value.fill_bytes(0xFF);
    for (const bool with_keys : {true, false}) {
      step.output.fill_bytes(0xFF);
      step.lse.fill_bytes(0xFF);
      ForwardArgs args = step.forward_args();
      if (!with_keys) args.key = args.value = {};
      impl->forward(args, metadata.get());
      EXPECT_EQ(step.output.snapshot(), output);
      EXPECT_EQ(step.lse.snapshot(), lse);
      EXPECT_EQ(step.cache_memory.snapshot(), cache);
    }
  }
}

TEST(FlashAttnSharedCache, WithoutTheOwnersStepItReadsWhatIsThere) {
  Step step({});
  ImplConfig shared = step.impl_config;
  shared.shares_kv_cache = true;
  const auto cache = step.cache_memory.snapshot();
  const auto metadata = step.build();
  find_backend("FLASH_ATTN").make_impl(shared)->forward(step.forward_args(), metadata.get());
  EXPECT_EQ(step.cache_memory.snapshot(), cache);
  // The new token's key was never written, so its row comes out as the NaN that the slot holds.
  EXPECT_NE(step.output.as<float>()[0], step.output.as<float>()[0]);
}

}  // namespace
}  // namespace attend
