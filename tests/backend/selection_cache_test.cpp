// SPDX-License-Identifier: Apache-2.0
#include "registry/selection_cache.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "backend/fake_backend.h"

namespace attend {
namespace {

using testing::plain_config;

/// Answers with its own call number, so that a test sees which call an answer comes from.
struct CountingCompute {
  std::atomic<int> calls = 0;
  Selection operator()(const AttentionConfig&) {
    Selection s;
    s.also_valid.push_back(std::to_string(++calls));
    return s;
  }
};

TEST(SelectionCache, ComputesOncePerConfiguration) {
  SelectionCache cache;
  CountingCompute compute;
  EXPECT_EQ(cache.get(plain_config(), compute).also_valid.at(0), "1");
  EXPECT_EQ(cache.get(plain_config(), compute).also_valid.at(0), "1");
  EXPECT_EQ(compute.calls, 1);
}

TEST(SelectionCache, EveryFieldMakesAnotherEntry) {
  const std::vector<std::function<void(AttentionConfig&)>> changes = {
      [](auto& c) { c.platform = Platform::parse("cuda:9.0"); },
      [](auto& c) { c.platform = Platform::parse("cuda:8.0"); },
      [](auto& c) { c.platform = Platform::parse("rocm:gfx942"); },
      [](auto& c) { c.platform = Platform::parse("rocm:gfx950"); },
      [](auto& c) { c.head_size = 64; },
      [](auto& c) { c.dtype = DType::f16; },
      [](auto& c) { c.kv_cache_dtype = "bf16"; },
      [](auto& c) { c.block_size = 16; },
      [](auto& c) { c.attn_type = AttentionType::encoder; },
      [](auto& c) { c.use_mla = true; },
      [](auto& c) { c.has_sink = true; },
      [](auto& c) { c.use_sparse = true; },
      [](auto& c) { c.use_mm_prefix = true; },
      [](auto& c) { c.use_per_head_quant_scales = true; },
      [](auto& c) { c.use_non_causal = true; },
      [](auto& c) { c.use_alibi_sqrt = true; },
      [](auto& c) { c.batch_invariant = true; },
      [](auto& c) { c.use_kv_connector = true; },
  };
  SelectionCache cache;
  CountingCompute compute;
  cache.get(plain_config(), compute);
  for (const auto& change : changes) {
    AttentionConfig config = plain_config();
    change(config);
    cache.get(config, compute);
  }
  EXPECT_EQ(compute.calls, 1 + static_cast<int>(changes.size()));
  EXPECT_EQ(cache.size(), 1 + changes.size());
}

TEST(SelectionCache, DoesNotGrowWithoutEnd) {
  SelectionCache cache;
  CountingCompute compute;
  AttentionConfig config = plain_config();
  for (int i = 0; i < 3 * static_cast<int>(SelectionCache::kMaxEntries); ++i) {
    config.head_size = i;
    cache.get(config, compute);
  }
  EXPECT_LE(cache.size(), SelectionCache::kMaxEntries);
}

TEST(SelectionCache, AnswersManyThreads) {
  SelectionCache cache;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        AttentionConfig config = plain_config();
        config.head_size = i % 7;
        const Selection s = cache.get(config, [&](const AttentionConfig& c) {
          Selection answer;
          answer.also_valid.push_back(std::to_string(c.head_size));
          return answer;
        });
        if (s.also_valid.at(0) != std::to_string(i % 7)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(cache.size(), 7U);
}

}  // namespace
}  // namespace attend
