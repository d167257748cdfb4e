// SPDX-License-Identifier: Apache-2.0
// An output row has the same bits whatever its neighbours, chunks, threads, layout and blocks are.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "properties/stepped_batch.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

/// How many batches, and multiplications in each.
struct Effort {
  int batches;
  std::int64_t products;
};
Effort effort_of(bool active_level) {
  return active_level ? Effort{scaled(200, 6), scaled(25'000'000, 3'000'000)}
                      : Effort{scaled(25, 2), scaled(10'000'000, 3'000'000)};
}

/// Every row of `got` against the reference run.
void expect_same_bits(const BatchData& data, const SteppedBatch& reference, const SteppedBatch& got,
                      const std::string& how) {
  for (int r = 0; r < data.shape.num_reqs(); ++r) {
    for (int i = 0; i < data.shape.query_lens[static_cast<std::size_t>(r)]; ++i) {
      if (reference.row(r, i) == got.row(r, i)) continue;
      ADD_FAILURE() << how << ": query " << i << " of request " << r << " has other bits";
      return;
    }
  }
}

/// Steps of at most `chunk` queries a request, all unfinished requests together, like a scheduler.
void run_in_chunks(const BatchData& data, SteppedBatch& batch, int chunk) {
  const std::vector<std::int32_t>& lens = data.shape.query_lens;
  for (int begin = 0; begin < *std::max_element(lens.begin(), lens.end()); begin += chunk) {
    std::vector<Part> parts;
    for (int r = 0; r < data.shape.num_reqs(); ++r) {
      const int len = lens[static_cast<std::size_t>(r)];
      if (begin < len) parts.push_back({r, begin, std::min(len, begin + chunk)});
    }
    batch.step(parts);
  }
}

/// Chunks of random sizes, random requests in each step.
void run_at_random(Rng& rng, const BatchData& data, SteppedBatch& batch) {
  const std::vector<std::int32_t>& lens = data.shape.query_lens;
  std::vector<int> done(lens.size(), 0);
  while (true) {
    std::vector<Part> parts;
    bool finished = true;
    for (int r = data.shape.num_reqs() - 1; r >= 0; --r) {
      const auto request = static_cast<std::size_t>(r);
      const int left = lens[request] - done[request];
      if (left == 0) continue;
      finished = false;
      if (rng.chance(0.4)) continue;
      const int n = rng.range(1, std::min(left, rng.pick({2, 40, 600})));
      parts.push_back({r, done[request], done[request] + n});
      done[request] += n;
    }
    if (finished) return;
    if (!parts.empty()) batch.step(parts);
  }
}

AttentionShape shape_of(Rng& rng, std::int64_t products, Arithmetic arithmetic) {
  AttentionShape shape = random_steps_shape(rng, products, false);
  // The one type of plain caches for which there is a choice.
  if (arithmetic != Arithmetic::automatic) shape.dtype = DType::bf16;
  return shape;
}

class OneBatch {
 public:
  OneBatch(std::uint64_t seed, std::int64_t products, const KernelOptions& kernels)
      : rng_(seed),
        data_(rng_, shape_of(rng_, products, kernels.arithmetic)),
        reference_options_{} {
    reference_options_.kernels = kernels;
    reference_options_.executor = &executor_of(1);
  }

  void check() {
    SCOPED_TRACE(data_.shape.describe());
    SteppedBatch reference(rng_, data_, reference_options_);
    reference.run_whole();
    const auto expect = [&](const std::string& how, const StepOptions& options, const auto& run) {
      SteppedBatch batch(rng_, data_, options);
      run(batch);
      expect_same_bits(data_, reference, batch, how);
    };
    const auto whole = [](SteppedBatch& b) { b.run_whole(); };
    const StepOptions& plain = reference_options_;

    expect("other block placement", plain, whole);
    expect("each request alone", plain, [&](SteppedBatch& b) {
      for (const Part& part : all_parts()) b.step({part});
    });
    expect("reversed batch", plain, [&](SteppedBatch& b) {
      std::vector<Part> parts = all_parts();
      std::reverse(parts.begin(), parts.end());
      b.step(parts);
    });
    for (const int chunk : {1, 7, 64, 512}) {
      expect("chunks of " + std::to_string(chunk), plain,
             [&](SteppedBatch& b) { run_in_chunks(data_, b, chunk); });
    }
    for (const int threads : {2, 3}) {
      expect(std::to_string(threads) + " threads",
             with([&](auto& o) { o.executor = &executor_of(threads); }), whole);
    }
    expect("HND", with([](auto& o) { o.kv = KvStorage::paged_hnd; }), whole);
    expect("ragged", with([](auto& o) { o.kv = KvStorage::ragged; }), whole);
    for (const int block_size : {1, 48, 256}) {
      expect("blocks of " + std::to_string(block_size),
             with([&](auto& o) { o.block_size = block_size; }), whole);
    }
    expect("everything different", with([&](auto& o) {
             o.executor = &executor_of(rng_.range(1, 3));
             o.kv = rng_.pick({KvStorage::ragged, KvStorage::paged_nhd, KvStorage::paged_hnd});
             o.block_size = conformance::random_block_size(rng_);
           }),
           [&](SteppedBatch& b) { run_at_random(rng_, data_, b); });
  }

 private:
  std::vector<Part> all_parts() const {
    std::vector<Part> parts;
    for (int r = 0; r < data_.shape.num_reqs(); ++r) {
      parts.push_back({r, 0, data_.shape.query_lens[static_cast<std::size_t>(r)]});
    }
    return parts;
  }
  template <typename Change>
  StepOptions with(const Change& change) const {
    StepOptions options = reference_options_;
    change(options);
    return options;
  }

  Rng rng_;
  BatchData data_;
  StepOptions reference_options_;
};

class SameBits : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(SameBits, WhateverTheBatchIs) {
  const Effort effort = effort_of(GetParam() == active_isa());
  for (int i = 0; i < effort.batches && !HasFailure(); ++i) {
    SCOPED_TRACE("batch " + std::to_string(i));
    OneBatch(static_cast<std::uint64_t>(1000 + i), effort.products, GetParam()).check();
  }
}

TEST(SameBitsInExactArithmetic, WhateverTheBatchIs) {
  const Effort effort = effort_of(false);
  for (int i = 0; i < effort.batches && !HasFailure(); ++i) {
    SCOPED_TRACE("batch " + std::to_string(i));
    OneBatch(static_cast<std::uint64_t>(5000 + i), effort.products,
             {available_isa_levels().back(), Arithmetic::exact})
        .check();
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, SameBits, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

}  // namespace
}  // namespace attend::testing
