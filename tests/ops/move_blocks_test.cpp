// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>

#include "attend/core/error.h"
#include "attend/ops/cache.h"
#include "attend/ops/mla_cache.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

// Element of a rank-4 cache with blocks in `block_dim`, in logical order.
double element(const ConstTensorView& t, int block_dim, std::int64_t block, std::int64_t i) {
  const ConstTensorView b = t.select(block_dim, block);
  const std::int64_t z = i % b.shape[2];
  const std::int64_t y = i / b.shape[2] % b.shape[1];
  return testing::get(b, {i / b.shape[2] / b.shape[1], y, z});
}

void expect_equal_blocks(const ConstTensorView& a, std::int64_t block_a, const ConstTensorView& b,
                         std::int64_t block_b, int block_dim) {
  const std::int64_t n = a.select(block_dim, 0).numel();
  for (std::int64_t i = 0; i < n; ++i) {
    ASSERT_EQ(element(a, block_dim, block_a, i), element(b, block_dim, block_b, i))
        << "block " << block_b << " element " << i;
  }
}

TEST(SwapBlocksTest, CopiesAcrossLayoutsAndKeepsTheRest) {
  Rng rng(5);
  SCOPED_TRACE(rng.trace());
  HostTensor device(DType::bf16, {5, 4, 3, 8});   // NHD
  HostTensor swapped(DType::bf16, {7, 3, 4, 8});  // HND memory
  device.fill_normal(rng);
  swapped.fill_normal(rng);
  HostTensor before(DType::bf16, {7, 3, 4, 8});
  std::ranges::copy(swapped.as<bf16>(), before.as<bf16>().begin());
  const TensorView dst = swapped.view().permute({0, 2, 1, 3});
  const TensorView old = before.view().permute({0, 2, 1, 3});
  const std::vector<BlockMove> moves = {{4, 6}, {0, 1}, {4, 0}, {2, 1}};  // block 1 twice
  swap_blocks(device, dst, 0, moves);
  expect_equal_blocks(device, 4, dst, 6, 0);
  expect_equal_blocks(device, 4, dst, 0, 0);
  expect_equal_blocks(device, 2, dst, 1, 0);
  for (const std::int64_t untouched : {2, 3, 4, 5}) {
    expect_equal_blocks(old, untouched, dst, untouched, 0);
  }
}

TEST(SwapBlocksTest, AnyBlockDimensionAndType) {
  Rng rng(6);
  SCOPED_TRACE(rng.trace());
  for (const DType dtype : {DType::u8, DType::f16, DType::f32, DType::i64}) {
    for (int block_dim = 0; block_dim < 4; ++block_dim) {
      HostTensor src(dtype, {3, 4, 3, 5});
      HostTensor dst(dtype, {3, 4, 3, 5});
      auto* bytes = static_cast<unsigned char*>(src.view().data);
      for (std::size_t i = 0; i < src.bytes(); ++i)
        bytes[i] = static_cast<unsigned char>(rng.next());
      const std::vector<BlockMove> moves = {{0, 2}, {2, 0}};
      swap_blocks(src, dst, block_dim, moves);
      // Bytes of a block, whatever the type.
      const auto bytes_of = [&](const TensorView& t, std::int64_t block) {
        TensorView b = t.select(block_dim, block);
        std::vector<unsigned char> out;
        for (std::int64_t i = 0; i < b.numel(); ++i) {
          const std::int64_t offset = i / b.shape[2] / b.shape[1] * b.strides[0] +
                                      i / b.shape[2] % b.shape[1] * b.strides[1] +
                                      i % b.shape[2] * b.strides[2];
          const auto size = static_cast<std::int64_t>(size_of(dtype));
          const auto* p = b.as<unsigned char>() + offset * size;
          out.insert(out.end(), p, p + size);
        }
        return out;
      };
      EXPECT_EQ(bytes_of(src, 0), bytes_of(dst, 2)) << block_dim;
      EXPECT_EQ(bytes_of(src, 2), bytes_of(dst, 0)) << block_dim;
      EXPECT_NE(bytes_of(src, 1), bytes_of(dst, 1)) << block_dim;
    }
  }
}

TEST(CopyBlocksTest, MovesApplyInOrderInEveryCache) {
  Rng rng(7);
  SCOPED_TRACE(rng.trace());
  HostTensor nhd(DType::f32, {4, 2, 2, 8});
  HostTensor planes(DType::f32, {2, 4, 2, 8});  // blocks in dimension 1
  nhd.fill_normal(rng);
  planes.fill_normal(rng);
  HostTensor before(DType::f32, {4, 2, 2, 8});
  std::ranges::copy(nhd.as<float>(), before.as<float>().begin());
  const std::vector<TensorView> caches = {nhd};
  const std::vector<BlockMove> moves = {{0, 1}, {1, 2}, {3, 3}};
  copy_blocks(caches, 0, moves);
  expect_equal_blocks(before, 0, nhd, 0, 0);
  expect_equal_blocks(before, 0, nhd, 1, 0);
  expect_equal_blocks(before, 0, nhd, 2, 0);  // block 1 was already overwritten
  expect_equal_blocks(before, 3, nhd, 3, 0);

  const std::vector<TensorView> two = {planes.view().slice(0, 0, 1), planes.view().slice(0, 1, 1)};
  const std::vector<BlockMove> one = {{2, 0}};
  copy_blocks(two, 1, one);
  for (const TensorView& t : two) expect_equal_blocks(t, 2, t, 0, 1);
}

TEST(CopyBlocksTest, NothingToDoIsNoError) {
  HostTensor cache(DType::f32, {4, 2});
  const std::vector<TensorView> caches = {cache};
  EXPECT_NO_THROW(copy_blocks({}, 0, {}));
  EXPECT_NO_THROW(copy_blocks(caches, 0, {}));
  const std::vector<BlockMove> moves = {{0, 100}};
  EXPECT_NO_THROW(copy_blocks({}, 0, moves));
}

// Rows of every size and type of MLA caches; a view with layers has gaps between its blocks.
TEST(MlaBlocksTest, SwapAndCopyMoveWholeRows) {
  Rng rng(8);
  SCOPED_TRACE(rng.trace());
  for (const auto& [dtype, dim] :
       {std::pair(DType::u8, 656), std::pair(DType::fp8_e4m3, 576), std::pair(DType::bf16, 320)}) {
    HostTensor layers(dtype, {5, 2, 4, dim}), swapped(dtype, {3, 4, dim});  // blocks, layers
    for (const HostTensor* t : {&layers, &swapped}) {
      for (std::size_t i = 0; i < t->bytes(); ++i)
        t->view().as<unsigned char>()[i] = static_cast<unsigned char>(rng.next());
    }
    const auto before = layers.snapshot(), other = swapped.snapshot();
    const std::size_t block = before.size() / 10;
    const auto is = [&](const HostTensor& now, std::size_t at,
                        const std::vector<unsigned char>& old, std::size_t from) {
      const auto bytes = now.snapshot();
      return std::equal(&bytes[at * block], &bytes[at * block] + block, &old[from * block]);
    };
    const std::vector<TensorView> caches = {layers.view().select(1, 0), layers.view().select(1, 1)};
    copy_blocks_mla(caches, std::vector<BlockMove>{{1, 3}, {3, 0}});
    for (const std::size_t layer : {0, 1}) {
      for (const auto& [to, from] :
           {std::pair<std::size_t, std::size_t>(0, 1), {1, 1}, {2, 2}, {3, 1}, {4, 4}})
        EXPECT_TRUE(is(layers, 2 * to + layer, before, 2 * from + layer)) << to << " " << layer;
    }
    swap_blocks(caches[1], swapped, 0, std::vector<BlockMove>{{4, 1}});
    EXPECT_TRUE(is(swapped, 1, before, 2 * 4 + 1));
    for (const std::size_t kept : {0, 2}) EXPECT_TRUE(is(swapped, kept, other, kept));
  }
}

class MoveBlocksErrorTest : public ::testing::Test {
 protected:
  static std::string blamed(const std::function<void()>& call) {
    try {
      call();
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "nothing";
  }
  bool nothing_written() const {
    for (const unsigned char byte : cache_.snapshot()) {
      if (byte != 0x5A) return false;
    }
    return true;
  }

  HostTensor cache_ = std::move(HostTensor(DType::bf16, {4, 2, 8}).fill_bytes(0x5A));
  HostTensor other_ = HostTensor(DType::bf16, {3, 2, 8});
};

TEST_F(MoveBlocksErrorTest, IndicesOutOfRange) {
  const auto swap = [&](BlockMove last) {
    const std::vector<BlockMove> moves = {{0, 0}, last};
    return blamed([&] { swap_blocks(other_, cache_, 0, moves); });
  };
  EXPECT_EQ(swap({3, 0}),
            "[swap_blocks] argument 'moves': expected 'from' blocks from 0 to 2, got 3 at index 1");
  EXPECT_EQ(swap({0, 4}),
            "[swap_blocks] argument 'moves': expected 'to' blocks from 0 to 3, got 4 at index 1");
  EXPECT_NE(swap({-1, 0}), "nothing");
  EXPECT_NE(swap({0, -1}), "nothing");
  const std::vector<TensorView> caches = {cache_, other_};  // the second has fewer blocks
  const std::vector<BlockMove> moves = {{0, 1}, {0, 3}};
  EXPECT_NE(blamed([&] { copy_blocks(caches, 0, moves); }), "nothing");
  EXPECT_TRUE(nothing_written());
}

TEST_F(MoveBlocksErrorTest, MlaCachesAreNamedAndHaveThreeDimensions) {
  const std::vector<TensorView> caches = {cache_};
  const std::vector<BlockMove> moves = {{0, 1}, {0, 4}};
  EXPECT_EQ(blamed([&] { copy_blocks_mla(caches, moves); }),
            "[copy_blocks_mla] argument 'moves': expected 'to' blocks from 0 to 3, got 4 at index "
            "1");
  const std::vector<TensorView> heads = {TensorView(cache_.view().data, DType::bf16, {4, 2, 2, 4})};
  EXPECT_EQ(blamed([&] { copy_blocks_mla(heads, {}); }).substr(0, 36),
            "[copy_blocks_mla] argument 'caches':");
  const std::vector<TensorView> same = {cache_, cache_};
  EXPECT_NE(blamed([&] { copy_blocks_mla(same, {}); }), "nothing");
  EXPECT_TRUE(nothing_written());
}

TEST_F(MoveBlocksErrorTest, CachesThatDoNotFit) {
  const std::vector<BlockMove> moves = {{0, 1}};
  const auto swap = [&](const ConstTensorView& src, int block_dim = 0) {
    return blamed([&] { swap_blocks(src, cache_, block_dim, moves); });
  };
  EXPECT_NE(swap(HostTensor(DType::f16, {3, 2, 8})), "nothing");
  EXPECT_NE(swap(HostTensor(DType::bf16, {3, 2, 4})), "nothing");
  EXPECT_NE(swap(HostTensor(DType::bf16, {3, 2})), "nothing");
  EXPECT_NE(swap(other_, 1), "nothing") << "dimension 0 differs";
  EXPECT_NE(swap(other_, 3), "nothing");
  EXPECT_NE(swap(other_, -1), "nothing");
  EXPECT_NE(swap(cache_), "nothing") << "same memory";
  EXPECT_NE(swap(TensorView(nullptr, DType::bf16, {3, 2, 8})), "nothing");
  TensorView wrong_rank = other_;
  wrong_rank.rank = 9;
  EXPECT_NE(swap(wrong_rank), "nothing");
  EXPECT_TRUE(nothing_written());
}

TEST_F(MoveBlocksErrorTest, CopyRefusesCachesThatShareMemory) {
  const std::vector<BlockMove> moves = {{0, 1}};
  const std::vector<TensorView> same = {cache_, cache_};
  EXPECT_EQ(blamed([&] { copy_blocks(same, 0, moves); }),
            "[copy_blocks] argument 'caches': expected caches apart from each other, got shared "
            "memory at indices 0 and 1");
  TensorView broadcast = cache_;
  broadcast.strides[1] = 0;
  const std::vector<TensorView> caches = {broadcast};
  EXPECT_NE(blamed([&] { copy_blocks(caches, 0, moves); }), "nothing");
}

}  // namespace
}  // namespace attend
