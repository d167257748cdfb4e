// SPDX-License-Identifier: Apache-2.0
// Chunked local attention through virtual batches, against the oracle on each row's own chunk.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "attend/backend/selector.h"
#include "attend/batch/local_attention.h"
#include "attend/oracle/attention.h"
#include "backend/flash_attn_step.h"
#include "support/scale.h"

namespace attend {
namespace {

using testing::Rng;
using testing::Step;
using testing::StepOptions;

StepOptions random_options(Rng& rng) {
  StepOptions o;
  o.query_lens.clear();
  o.context_lens.clear();
  for (int r = 0; r < 4; ++r) {
    o.query_lens.push_back(static_cast<int>(rng.chance(0.4) ? 1 : rng.integer(0, 150)));
    o.context_lens.push_back(static_cast<int>(rng.integer(0, 400)));
  }
  o.query_lens[0] = 33;  // never a batch without tokens
  o.dtype = rng.pick(std::vector{DType::f32, DType::bf16});
  o.layout = rng.pick(std::vector{KvLayout::nhd, KvLayout::hnd});
  o.seed = rng.next();
  return o;
}

void run_local(Step& step, int chunk) {
  const LocalAttentionBatch local =
      make_local_attention_virtual_batches(chunk, step.options.block_size, step.batch);
  const auto metadata =
      find_backend("FLASH_ATTN").make_builder(step.builder_config)->build(0, local.common);
  step.workspace.reserve(metadata->workspace_bytes());
  find_backend("FLASH_ATTN")
      .make_impl(step.impl_config)
      ->forward(step.forward_args(), metadata.get());
}

/// Element of a key (plane 0) or value (plane 1) of a request, as the cache has it.
double cached(const Step& step, int plane, int request, std::int64_t position, int head, int d) {
  const std::int64_t slot = step.slot(request, static_cast<int>(position));
  const int block_size = step.options.block_size;
  return testing::get(step.cache, {plane, slot / block_size, slot % block_size, head, d});
}

void expect_row(const Step& step, int request, int token, int position, int head, int chunk) {
  const int begin = position / chunk * chunk;
  const int kv_head = head / (step.options.num_q_heads / step.options.num_kv_heads);
  oracle::RowProblem p;
  p.head_dim_qk = p.head_dim_v = step.options.head_size;
  p.position = position - begin;
  p.num_keys = position - begin + 1;
  p.scale = 1.0 / std::sqrt(step.options.head_size);
  p.q = [&](int d) { return testing::get(step.query, {token, head, d}); };
  p.k = [&](std::int64_t j, int d) { return cached(step, 0, request, begin + j, kv_head, d); };
  p.v = [&](std::int64_t j, int d) { return cached(step, 1, request, begin + j, kv_head, d); };
  const oracle::RowResult want = oracle::attention_row(p);
  const int size = step.options.head_size;
  for (int d = 0; d < size; ++d) {
    ASSERT_NEAR(testing::get(step.output, {token, head, d}), want.out[static_cast<std::size_t>(d)],
                oracle::out_error_bound(want, d, size, step.options.dtype))
        << "request " << request << " position " << position << " head " << head;
  }
  ASSERT_NEAR(testing::get(step.lse, {token, head}), want.lse, oracle::lse_error_bound(want, size));
}

/// Poisons the keys before the chunk of a request's first query, which nobody sees.
void poison_hidden_keys(Step& step, int chunk) {
  for (int r = 0; r < step.num_reqs(); ++r) {
    const int hidden = step.options.context_lens[static_cast<std::size_t>(r)] / chunk * chunk;
    for (int p = 0; p < hidden; ++p) {
      const std::int64_t slot = step.slot(r, p);
      for (int plane = 0; plane < 2; ++plane) {
        for (int h = 0; h < step.options.num_kv_heads; ++h) {
          const TensorView row = step.cache.select(0, plane)
                                     .select(0, slot / step.options.block_size)
                                     .select(0, slot % step.options.block_size)
                                     .select(0, h);
          std::memset(row.data, 0xFF, static_cast<std::size_t>(row.shape[0]) * size_of(row.dtype));
        }
      }
    }
  }
}

TEST(FlashAttnLocalAttention, EveryRowSeesItsChunkAndTheCacheIsFilled) {
  Rng rng(5);
  SCOPED_TRACE(rng.trace());
  for (int i = 0; i < testing::scaled(12, 3) && !HasFatalFailure(); ++i) {
    const int chunk = 16 * static_cast<int>(rng.integer(1, 20));
    SCOPED_TRACE("batch " + std::to_string(i) + " chunk " + std::to_string(chunk));
    Step step(random_options(rng));
    run_local(step, chunk);
    step.expect_cache();
    for (int r = 0, token = 0; r < step.num_reqs(); ++r) {
      const int seq_len = step.seq_lens[static_cast<std::size_t>(r)];
      for (int p = step.batch.num_computed_tokens(r); p < seq_len; ++p, ++token) {
        for (int h = 0; h < step.options.num_q_heads && !HasFatalFailure(); ++h) {
          expect_row(step, r, token, p, h, chunk);
        }
      }
    }
    const auto output = step.output.snapshot(), lse = step.lse.snapshot();
    poison_hidden_keys(step, chunk);
    run_local(step, chunk);
    EXPECT_EQ(step.output.snapshot(), output);
    EXPECT_EQ(step.lse.snapshot(), lse);
  }
}

}  // namespace
}  // namespace attend
