// SPDX-License-Identifier: Apache-2.0
// Layers that share a cache, run on the wanted rows only, give the bits of the full prefill.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/batch/fast_prefill.h"
#include "backend/flash_attn_step.h"
#include "support/random.h"
#include "support/scale.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;
using testing::Step;
using testing::StepOptions;

/// Any number of requests: decodes, chunks, whole prompts; some without any wanted row.
StepOptions random_options(Rng& rng) {
  StepOptions o;
  o.query_lens.clear();
  o.context_lens.clear();
  const auto requests = rng.integer(1, 5);
  for (int r = 0; r < requests; ++r) {
    o.query_lens.push_back(static_cast<int>(rng.integer(0, 3) == 0 ? 1 : rng.integer(1, 300)));
    o.context_lens.push_back(static_cast<int>(rng.integer(0, 1) == 0 ? 0 : rng.integer(1, 600)));
  }
  o.dtype =
      std::vector{DType::f32, DType::f16, DType::bf16}[static_cast<std::size_t>(rng.integer(0, 2))];
  o.num_kv_heads = static_cast<int>(rng.integer(1, 2));
  o.num_q_heads = o.num_kv_heads * static_cast<int>(rng.integer(1, 5));
  o.head_size = 8 * static_cast<int>(rng.integer(1, 9));
  if (rng.integer(0, 1) == 0) o.sliding_window = static_cast<int>(rng.integer(1, 400));
  if (rng.integer(0, 2) == 0) o.softcap = 4.0F;
  if (rng.integer(0, 2) == 0) {
    o.alibi_slopes.assign(static_cast<std::size_t>(o.num_q_heads), 0.3F);
  }
  o.num_workers = static_cast<int>(rng.integer(1, 3));
  o.seed = static_cast<std::uint64_t>(rng.integer(1, 1 << 30));
  return o;
}

/// The last 0 to 4 tokens of each request, at least one in all.
std::vector<std::int32_t> random_logits(Rng& rng, const CommonMetadata& m) {
  std::vector<std::int32_t> wanted;
  for (int r = 0; r < m.num_reqs; ++r) {
    const std::int32_t end = m.query_start_loc[static_cast<std::size_t>(r) + 1];
    const auto kept = static_cast<std::int32_t>(
        std::min<std::int64_t>(m.query_len(r), rng.integer(r + 1 == m.num_reqs ? 1 : 0, 4)));
    for (std::int32_t t = end - kept; t < end; ++t) wanted.push_back(t);
  }
  return wanted;
}

HostTensor rows_of(const HostTensor& from, const std::vector<std::int32_t>& rows) {
  const ConstTensorView view = from.view();
  HostTensor to(view.dtype, {static_cast<std::int64_t>(rows.size()), view.shape[1], view.shape[2]});
  const std::size_t bytes =
      static_cast<std::size_t>(view.shape[1] * view.shape[2]) * size_of(view.dtype);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(to.view().select(0, static_cast<std::int64_t>(i)).data,
                view.select(0, rows[i]).data, bytes);
  }
  return to;
}

TEST(FastPrefill, KeptRowsHaveTheBitsOfTheFullPrefill) {
  Rng rng(11);
  int left_out = 0;
  for (int i = 0; i < testing::scaled(60, 8) && !HasFailure(); ++i) {
    SCOPED_TRACE("batch " + std::to_string(i));
    Step step(random_options(rng));
    step.batch.logits_indices = random_logits(rng, step.batch);
    step.run();
    const auto cache = step.cache_memory.snapshot();

    ImplConfig shared = step.impl_config;
    shared.shares_kv_cache = true;
    const CommonMetadata fast = make_kv_sharing_fast_prefill_metadata(step.batch);
    if (step.batch.max_query_len > 1) {
      ASSERT_EQ(fast.num_tokens, static_cast<int>(step.batch.logits_indices.size()));
    } else {
      step.batch.logits_indices.clear();
      for (int t = 0; t < step.batch.num_tokens; ++t) step.batch.logits_indices.push_back(t);
    }
    left_out += step.batch.num_tokens - fast.num_tokens;
    const auto metadata =
        find_backend("FLASH_ATTN").make_builder(step.builder_config)->build(0, fast);
    step.workspace.reserve(metadata->workspace_bytes());
    const HostTensor query = rows_of(step.query, step.batch.logits_indices);
    const HostTensor expected = rows_of(step.output, step.batch.logits_indices);
    HostTensor output(step.options.dtype,
                      {fast.num_tokens, step.options.num_q_heads, step.options.head_size});
    HostTensor lse(DType::f32, {fast.num_tokens, step.options.num_q_heads});
    output.fill_bytes(0xFF);
    lse.fill_bytes(0xFF);
    ForwardArgs args = step.forward_args();
    args.query = query;
    args.key = args.value = {};
    args.output = output;
    args.lse = lse;
    find_backend("FLASH_ATTN").make_impl(shared)->forward(args, metadata.get());
    EXPECT_EQ(output.snapshot(), expected.snapshot());
    for (std::size_t t = 0; t < step.batch.logits_indices.size(); ++t) {
      const auto row = static_cast<std::int64_t>(t);
      EXPECT_EQ(std::memcmp(lse.view().select(0, row).data,
                            step.lse.view().select(0, step.batch.logits_indices[t]).data,
                            static_cast<std::size_t>(step.options.num_q_heads) * sizeof(float)),
                0);
    }
    EXPECT_EQ(step.cache_memory.snapshot(), cache);
  }
  EXPECT_GT(left_out, testing::scaled(3000, 100));
}

}  // namespace
}  // namespace attend
