// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/differential_cache.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "attend/core/error.h"
#include "attend/ops/cache.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

constexpr std::int64_t kTokens = 5, kHeads = 4, kDim = 16, kBlocks = 3, kBlockSize = 16;

/// One call with random rows and slots in all blocks. The cache is poison.
struct Problem {
  HostTensor key, value, cache, k_scale{DType::f32, {kHeads}}, v_scale{DType::f32, {kHeads}};
  std::vector<std::int64_t> slots = {47, 3, -1, 16, 0};

  Problem(DType dtype, DType stored)
      : key(dtype, {kTokens + 1, kHeads, kDim}),
        value(dtype, {kTokens + 1, kHeads, kDim}),
        cache(stored, {2, 2, kBlocks, kBlockSize, kHeads / 2, kDim}) {
    Rng rng(3);
    key.fill_normal(rng);
    value.fill_normal(rng);
    k_scale.fill_uniform(rng, 0.1F, 2.0F);
    v_scale.fill_uniform(rng, 0.1F, 2.0F);
    cache.fill_bytes(0xff);
  }
  DifferentialReshapeAndCacheArgs args() {
    DifferentialReshapeAndCacheArgs a;
    a.key = key;
    a.value = value;
    a.kv_cache = cache;
    a.slot_mapping = ConstTensorView(slots.data(), DType::i64, {kTokens});
    if (is_fp8(cache.view().dtype)) {
      a.k_scale = k_scale;
      a.v_scale = v_scale;
    }
    return a;
  }
  std::int64_t head_of(HeadPairing pairing, std::int64_t pair, std::int64_t branch) const {
    return pairing == HeadPairing::halves ? branch * kHeads / 2 + pair : 2 * pair + branch;
  }
};

// reshape_and_cache_flash() of one head after the other into the cache's heads.
void write_heads(Problem& p, HeadPairing pairing) {
  for (const std::int64_t branch : {0, 1}) {
    for (std::int64_t pair = 0; pair < kHeads / 2; ++pair) {
      const std::int64_t head = p.head_of(pairing, pair, branch);
      const TensorView planes = p.cache.view().select(0, branch).slice(3, pair, 1);
      ReshapeAndCacheFlashArgs a;
      a.key = p.key.view().slice(1, head, 1);
      a.value = p.value.view().slice(1, head, 1);
      a.key_cache = planes.select(0, 0);
      a.value_cache = planes.select(0, 1);
      a.slot_mapping = p.args().slot_mapping;
      if (is_fp8(p.cache.view().dtype)) {
        a.k_scale = p.k_scale.view().slice(0, head, 1);
        a.v_scale = p.v_scale.view().slice(0, head, 1);
      }
      reshape_and_cache_flash(a);
    }
  }
}

TEST(DifferentialReshapeAndCache, WritesWhatTheOpOfOneBranchDoes) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const DType stored : {dtype, DType::fp8_e4m3, DType::fp8_e5m2}) {
      for (const HeadPairing pairing : {HeadPairing::interleaved, HeadPairing::halves}) {
        Problem expected(dtype, stored), got(dtype, stored);
        write_heads(expected, pairing);
        DifferentialReshapeAndCacheArgs a = got.args();
        a.pairing = pairing;
        differential_reshape_and_cache(a);
        EXPECT_EQ(got.cache.snapshot(), expected.cache.snapshot())
            << to_string(dtype) << " into " << to_string(stored);
      }
    }
  }
}

TEST(DifferentialReshapeAndCache, OneScaleServesAllHeads) {
  Problem expected(DType::bf16, DType::fp8_e4m3), got(DType::bf16, DType::fp8_e4m3);
  for (HostTensor* scale : {&expected.k_scale, &expected.v_scale})
    scale->fill([] { return 0.75F; });
  const float one = 0.75F;
  DifferentialReshapeAndCacheArgs a = got.args();
  a.k_scale = a.v_scale = ConstTensorView(&one, DType::f32, {1});
  differential_reshape_and_cache(expected.args());
  differential_reshape_and_cache(a);
  EXPECT_EQ(got.cache.snapshot(), expected.cache.snapshot());
}

TEST(DifferentialReshapeAndCache, ResultsDoNotDependOnWorkers) {
  const auto pool = make_thread_pool(3);
  for (const DType stored : {DType::bf16, DType::fp8_e5m2}) {
    Problem alone(DType::bf16, stored), shared(DType::bf16, stored);
    differential_reshape_and_cache(alone.args());
    differential_reshape_and_cache(shared.args(), pool.get());
    EXPECT_EQ(alone.cache.snapshot(), shared.cache.snapshot());
  }
}

using A = DifferentialReshapeAndCacheArgs;

struct Spoilt {
  const char* argument;
  std::function<void(A&, Problem&)> spoil;
};

void expect_refused(const Spoilt& s, DType stored) {
  Problem p(DType::bf16, stored);
  A a = p.args();
  s.spoil(a, p);
  const auto before = p.cache.snapshot();
  try {
    differential_reshape_and_cache(a);
    ADD_FAILURE() << "no error for a bad " << s.argument;
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.op(), "differential_reshape_and_cache");
    EXPECT_EQ(e.argument(), s.argument) << e.what();
  }
  EXPECT_EQ(p.cache.snapshot(), before);
}

const float kBadScales[] = {1.0F, 0.0F, std::numeric_limits<float>::quiet_NaN(), -1.0F};

TEST(DifferentialReshapeAndCache, StatesWhatIsWrong) {
  const std::vector<Spoilt> cases = {
      {"key", [](A& a, Problem&) { a.key = {}; }},
      {"key", [](A& a, Problem&) { a.key.dtype = DType::i8; }},
      {"key", [](A& a, Problem&) { a.key.strides[2] = 2; }},
      {"key", [](A& a, Problem&) { a.key = a.key.slice(1, 0, 3); }},
      {"value", [](A& a, Problem&) { a.value.dtype = DType::f16; }},
      {"value", [](A& a, Problem&) { a.value = a.value.slice(1, 0, 2); }},
      {"value", [](A& a, Problem&) { a.value = a.value.slice(2, 0, 8); }},
      {"kv_cache", [](A& a, Problem&) { a.kv_cache = a.kv_cache.select(0, 0); }},
      {"kv_cache", [](A& a, Problem&) { a.kv_cache.dtype = DType::f16; }},
      {"kv_cache", [](A& a, Problem&) { a.kv_cache = a.kv_cache.slice(0, 0, 1); }},
      {"kv_cache", [](A& a, Problem&) { a.kv_cache = a.kv_cache.slice(1, 0, 1); }},
      {"kv_cache", [](A& a, Problem&) { a.kv_cache = a.kv_cache.slice(4, 0, 1); }},
      {"kv_cache", [](A& a, Problem&) { a.kv_cache = a.kv_cache.slice(5, 0, 8); }},
      {"kv_cache", [](A& a, Problem&) { a.kv_cache.strides[0] = 0; }},
      {"kv_cache", [](A& a, Problem&) { a.kv_cache.strides[5] = 2; }},
      {"kv_cache", [](A& a, Problem&) { a.value.data = a.kv_cache.data; }},
      {"slot_mapping", [](A& a, Problem&) { a.slot_mapping.dtype = DType::i32; }},
      {"slot_mapping", [](A&, Problem& p) { p.slots[1] = kBlocks * kBlockSize; }},
      {"slot_mapping", [](A&, Problem& p) { p.slots[4] = INT64_MAX; }},
  };
  for (const Spoilt& s : cases) expect_refused(s, DType::bf16);
  const std::vector<Spoilt> scales = {
      {"k_scale", [](A& a, Problem&) { a.k_scale = {}; }},
      {"v_scale", [](A& a, Problem&) { a.v_scale = {}; }},
      {"k_scale", [](A& a, Problem&) { a.k_scale = a.k_scale.slice(0, 0, 2); }},
      {"v_scale", [](A& a, Problem&) { a.v_scale.data = kBadScales; }},
      {"v_scale", [](A& a, Problem&) { a.v_scale = a.v_scale.slice(0, 0, 1); }},
  };
  for (const Spoilt& s : scales) expect_refused(s, DType::fp8_e4m3);
}

}  // namespace
}  // namespace attend::testing
