// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <functional>

#include "attend/cache/differential.h"
#include "attend/core/error.h"
#include "attend/ops/cache.h"
#include "support/host_tensor.h"

namespace attend::testing {
namespace {

using ::testing::ElementsAre;

KvCacheSpec spec(int num_layers = 0) {
  return {.num_blocks = 5,
          .block_size = 16,
          .num_kv_heads = 6,
          .head_size = 64,
          .dtype = DType::bf16,
          .num_layers = num_layers};
}

// "op: argument" of the error that the shape ends in.
std::string refusal(const std::function<void(KvCacheSpec&)>& spoil) {
  KvCacheSpec s = spec();
  spoil(s);
  try {
    differential_cache_shape(s);
  } catch (const InvalidArgument& e) {
    return e.op() + ": " + e.argument();
  }
  return "none";
}

TEST(DifferentialCacheSpec, HalfOfTheHeadsAreInEachBranch) {
  EXPECT_THAT(differential_cache_shape(spec()), ElementsAre(2, 2, 5, 16, 3, 64));
  EXPECT_THAT(differential_cache_shape(spec(4)), ElementsAre(4, 2, 2, 5, 16, 3, 64));
}

TEST(DifferentialCacheSpec, StatesWhatIsWrong) {
  EXPECT_EQ(refusal([](KvCacheSpec& s) { s.num_kv_heads = 5; }),
            "differential_cache_shape: num_kv_heads");
  EXPECT_EQ(refusal([](KvCacheSpec& s) { s.block_size = 24; }),
            "differential_cache_shape: block_size");
  EXPECT_EQ(refusal([](KvCacheSpec& s) {
              s.format = KvFormat::fp8_ds_mla;
              s.dtype = DType::u8;
              s.num_kv_heads = 1;
              s.head_size = 576;
            }),
            "differential_cache_shape: format");
  EXPECT_EQ(refusal([](KvCacheSpec& s) { s.head_size = 0; }), "KvCacheSpec::validate: head_size");
}

TEST(DifferentialCacheSpec, StrideOrders) {
  const auto strides = [](KvLayout layout, int num_layers) {
    const TensorView view =
        cache_view(nullptr, DType::bf16, differential_cache_shape(spec(num_layers)),
                   differential_stride_order(layout, num_layers > 0));
    return std::vector<std::int64_t>(view.strides.begin(), view.strides.begin() + view.rank);
  };
  constexpr int kBlock = 16 * 3 * 64, kLayers = 4;
  EXPECT_THAT(strides(KvLayout::nhd, 0), ElementsAre(10 * kBlock, 5 * kBlock, kBlock, 192, 64, 1));
  EXPECT_THAT(strides(KvLayout::hnd, 0), ElementsAre(10 * kBlock, 5 * kBlock, kBlock, 64, 1024, 1));
  // One block of all layers is one run of memory; with HND, one head of that.
  EXPECT_THAT(strides(KvLayout::nhd, kLayers),
              ElementsAre(4 * kBlock, 2 * kBlock, kBlock, 4 * kLayers * kBlock, 192, 64, 1));
  EXPECT_THAT(
      strides(KvLayout::hnd, kLayers),
      ElementsAre(4 * 1024, 2 * 1024, 1024, 4 * kLayers * kBlock, 64, kLayers * 4 * 1024, 1));
}

// Seed 004 took the branches for K and V, and moved whole branches instead of blocks.
TEST(DifferentialCacheSpec, BlocksMoveInBothBranchesOfKeysAndValues) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (const bool hnd : {false, true}) {
    const auto order = differential_stride_order(hnd ? KvLayout::hnd : KvLayout::nhd, false);
    const auto shape = differential_cache_shape(spec());
    HostTensor from(DType::bf16, shape), to(DType::bf16, shape);
    from.fill_uniform(rng);
    to.fill_uniform(rng);
    const TensorView a = cache_view(from.view().data, DType::bf16, shape, order);
    const TensorView b = cache_view(to.view().data, DType::bf16, shape, order);
    const auto block = [](const TensorView& cache, std::int64_t n) {
      std::vector<double> values;
      for (const int branch : {0, 1})
        for (const int plane : {0, 1})
          for (std::int64_t t = 0; t < cache.shape[3]; ++t)
            for (std::int64_t h = 0; h < cache.shape[4]; ++h)
              for (std::int64_t d = 0; d < cache.shape[5]; ++d)
                values.push_back(get(cache, {branch, plane, n, t, h, d}));
      return values;
    };
    const auto untouched = block(b, 0);
    const std::vector<BlockMove> moves = {{3, 1}};
    swap_blocks(a, b, kDifferentialBlockDim, moves);
    EXPECT_EQ(block(b, 1), block(a, 3));
    EXPECT_EQ(block(b, 0), untouched);

    const std::vector<TensorView> caches = {b};
    const std::vector<BlockMove> copies = {{1, 4}};
    copy_blocks(caches, kDifferentialBlockDim, copies);
    EXPECT_EQ(block(b, 4), block(a, 3));
    EXPECT_EQ(block(b, 0), untouched);
  }
}

}  // namespace
}  // namespace attend::testing
