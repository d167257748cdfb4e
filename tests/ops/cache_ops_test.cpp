// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>
#include <map>

#include "attend/cache/kv_cache_spec.h"
#include "attend/core/error.h"
#include "attend/ops/cache.h"
#include "support/host_tensor.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

struct Shape {
  std::int64_t tokens = 0, heads = 0, dim = 0, value_dim = 0, blocks = 0, block_size = 0;
};

// View [blocks, block_size, heads, dim] over memory in NHD or HND order.
TensorView cache_of(HostTensor& memory, KvLayout layout) {
  const TensorView t = memory.view();
  return layout == KvLayout::nhd ? t : t.permute({0, 2, 1, 3});
}

HostTensor cache_memory(DType dtype, const Shape& s, std::int64_t dim, KvLayout layout) {
  if (layout == KvLayout::nhd) return {dtype, {s.blocks, s.block_size, s.heads, dim}};
  return {dtype, {s.blocks, s.heads, s.block_size, dim}};
}

std::vector<std::int64_t> random_slots(Rng& rng, const Shape& s, bool distinct) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(s.blocks * s.block_size));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int64_t>(i);
  std::vector<std::int64_t> slots;
  for (std::int64_t t = 0; t < s.tokens; ++t) {
    const auto i =
        static_cast<std::size_t>(rng.integer(0, static_cast<std::int64_t>(all.size()) - 1));
    slots.push_back(rng.chance(0.2) ? -1 : all[i]);
    if (distinct) all.erase(all.begin() + static_cast<std::ptrdiff_t>(i));
  }
  return slots;
}

// Every element of the cache against "the last row with this slot, else what was there".
void expect_written(const TensorView& cache, const TensorView& before, const ConstTensorView& rows,
                    const std::vector<std::int64_t>& slots) {
  std::map<std::int64_t, std::int64_t> row_of;
  for (std::size_t t = 0; t < slots.size(); ++t) row_of[slots[t]] = static_cast<std::int64_t>(t);
  for (std::int64_t b = 0; b < cache.shape[0]; ++b) {
    for (std::int64_t o = 0; o < cache.shape[1]; ++o) {
      const auto it = row_of.find(b * cache.shape[1] + o);
      for (std::int64_t h = 0; h < cache.shape[2]; ++h) {
        for (std::int64_t d = 0; d < cache.shape[3]; ++d) {
          const double want = it == row_of.end() ? testing::get(before, {b, o, h, d})
                                                 : testing::get(rows, {it->second, h, d});
          ASSERT_EQ(testing::get(cache, {b, o, h, d}), want)
              << "block " << b << " offset " << o << " head " << h << " dim " << d;
        }
      }
    }
  }
}

struct WriteCase {
  DType dtype;
  KvLayout layout;
  Shape shape;
  bool distinct = true;
  int threads = 1;
};

void run_case(const WriteCase& c, Rng& rng) {
  const Shape& s = c.shape;
  HostTensor key(c.dtype, {s.tokens + 2, s.heads, s.dim});  // two rows of padding
  HostTensor value(c.dtype, {s.tokens + 2, s.heads, s.value_dim});
  key.fill_uniform(rng);
  value.fill_uniform(rng);
  HostTensor k_memory = cache_memory(c.dtype, s, s.dim, c.layout);
  HostTensor v_memory = cache_memory(c.dtype, s, s.value_dim, c.layout);
  k_memory.fill_uniform(rng);
  v_memory.fill_uniform(rng);
  std::vector<unsigned char> k_before = k_memory.snapshot();
  std::vector<unsigned char> v_before = v_memory.snapshot();
  const TensorView k_cache = cache_of(k_memory, c.layout);
  const TensorView v_cache = cache_of(v_memory, c.layout);
  const auto slots = random_slots(rng, s, c.distinct);

  const auto pool = make_thread_pool(c.threads);
  reshape_and_cache_flash({.key = key,
                           .value = value,
                           .key_cache = k_cache,
                           .value_cache = v_cache,
                           .slot_mapping = {slots.data(), DType::i64, {s.tokens}}},
                          pool.get());
  TensorView k_old = k_cache;
  k_old.data = k_before.data();
  TensorView v_old = v_cache;
  v_old.data = v_before.data();
  expect_written(k_cache, k_old, key, slots);
  expect_written(v_cache, v_old, value, slots);
}

TEST(ReshapeAndCacheTest, EveryTypeAndLayout) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
      for (const Shape& s : {Shape{9, 2, 8, 8, 3, 16}, Shape{5, 3, 16, 8, 6, 1},
                             Shape{1, 1, 24, 40, 2, 4}, Shape{0, 2, 8, 8, 1, 16}}) {
        run_case({dtype, layout, s}, rng);
      }
    }
  }
}

TEST(ReshapeAndCacheTest, TheLaterRowWins) {
  Rng rng(2);
  SCOPED_TRACE(rng.trace());
  for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
    run_case({DType::f16, layout, {40, 2, 8, 8, 1, 4}, false}, rng);
  }
}

// Large enough for the executor; many rows for few slots.
TEST(ReshapeAndCacheTest, WorkersAgreeWithTheSerialOrder) {
  Rng rng(3);
  SCOPED_TRACE(rng.trace());
  for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
    for (const int threads : {2, 3, 8}) {
      run_case({DType::bf16, layout, {700, 3, 64, 72, 4, 16}, false, threads}, rng);
    }
  }
}

// Large enough to write around the caches, with rows that start and end inside a line.
TEST(ReshapeAndCacheTest, StreamedRowsAreTheSame) {
  Rng rng(8);
  SCOPED_TRACE(rng.trace());
  for (const KvLayout layout : {KvLayout::nhd, KvLayout::hnd}) {
    run_case({DType::bf16, layout, {1000, 3, 1000, 504, 4, 16}, false, 3}, rng);
    run_case({DType::bf16, layout, {60000, 3, 8, 16, 8, 4}, false, 2}, rng);
  }
}

TEST(ReshapeAndCacheTest, StridedRowsAndInterleavedCaches) {
  Rng rng(4);
  SCOPED_TRACE(rng.trace());
  constexpr std::int64_t kTokens = 6;
  constexpr std::int64_t kHeads = 2;
  constexpr std::int64_t kDim = 8;
  // K and V are slices of one fused [T, 3, H, D] tensor; both caches live in [blocks, 2, ...].
  HostTensor fused(DType::bf16, {kTokens, 3, kHeads, kDim});
  fused.fill_normal(rng);
  HostTensor memory(DType::bf16, {4, 2, 16, kHeads, kDim});
  HostTensor zeros(DType::bf16, {4, 16, kHeads, kDim});
  const std::vector<std::int64_t> slots = {17, 3, -1, 63, 16, 0};
  const ReshapeAndCacheFlashArgs args{.key = fused.view().select(1, 1),
                                      .value = fused.view().select(1, 2),
                                      .key_cache = memory.view().select(1, 0),
                                      .value_cache = memory.view().select(1, 1),
                                      .slot_mapping = {slots.data(), DType::i64, {kTokens}}};
  reshape_and_cache_flash(args);
  expect_written(args.key_cache, zeros, args.key, slots);
  expect_written(args.value_cache, zeros, args.value, slots);
}

TEST(ReshapeAndCacheTest, HeadsWithGapsOnOneSideOnly) {
  Rng rng(9);
  SCOPED_TRACE(rng.trace());
  HostTensor wide(DType::f32, {4, 3, 24});  // heads of 8 with gaps of 16
  wide.fill_normal(rng);
  HostTensor dense_k(DType::f32, {2, 4, 3, 8});
  HostTensor dense_v(DType::f32, {2, 4, 3, 8});
  HostTensor zeros(DType::f32, {2, 4, 3, 8});
  const std::vector<std::int64_t> slots = {7, 0, 5, 2};
  const ConstTensorView slot_view(slots.data(), DType::i64, {4});
  const ConstTensorView key = wide.view().slice(2, 0, 8);
  const ConstTensorView value = wide.view().slice(2, 8, 8);
  reshape_and_cache_flash({key, value, dense_k, dense_v, slot_view});
  expect_written(dense_k, zeros, key, slots);
  expect_written(dense_v, zeros, value, slots);

  HostTensor dense(DType::f32, {4, 3, 8});
  dense.fill_normal(rng);
  HostTensor wide_cache(DType::f32, {2, 4, 3, 24});
  const TensorView k_cache = wide_cache.view().slice(3, 0, 8);
  const TensorView v_cache = wide_cache.view().slice(3, 16, 8);
  reshape_and_cache_flash({dense, dense, k_cache, v_cache, slot_view});
  expect_written(k_cache, zeros, dense, slots);
  expect_written(v_cache, zeros, dense, slots);
  expect_written(wide_cache.view().slice(3, 8, 8), zeros, dense, {});
}

TEST(ReshapeAndCacheTest, CopiesNanBits) {
  std::vector<std::uint16_t> key = {0x7F81, 0xFFC3, 0x7E01, 0x7C01, 1, 2, 3, 4};
  std::vector<std::uint16_t> value = key;
  std::vector<std::uint16_t> k_cache(8), v_cache(8);
  const std::int64_t slot = 0;
  reshape_and_cache_flash({.key = {key.data(), DType::f16, {1, 1, 8}},
                           .value = {value.data(), DType::f16, {1, 1, 8}},
                           .key_cache = {k_cache.data(), DType::f16, {1, 1, 1, 8}},
                           .value_cache = {v_cache.data(), DType::f16, {1, 1, 1, 8}},
                           .slot_mapping = {&slot, DType::i64, {1}}});
  EXPECT_EQ(k_cache, key);
  EXPECT_EQ(v_cache, value);
}

class ReshapeAndCacheErrorTest : public ::testing::Test {
 protected:
  ReshapeAndCacheErrorTest() {
    args_ = {.key = key_,
             .value = value_,
             .key_cache = k_cache_,
             .value_cache = v_cache_,
             .slot_mapping = {slots_.data(), DType::i64, {4}}};
  }

  // Argument that the op blames after `change`; checks that nothing was written.
  std::string blamed(const std::function<void(ReshapeAndCacheFlashArgs&)>& change) {
    ReshapeAndCacheFlashArgs a = args_;
    change(a);
    std::string argument = "nothing";
    try {
      reshape_and_cache_flash(a);
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.op(), "reshape_and_cache_flash");
      argument = e.argument();
      message_ = e.what();
    }
    for (const HostTensor* t : {&k_cache_, &v_cache_}) {
      for (const unsigned char byte : t->snapshot()) {
        if (byte != 0x5A) return argument + ", but wrote";
      }
    }
    return argument;
  }

  HostTensor key_ = HostTensor(DType::bf16, {5, 2, 8});
  HostTensor value_ = HostTensor(DType::bf16, {5, 2, 16});
  HostTensor k_cache_ = std::move(HostTensor(DType::bf16, {3, 4, 2, 8}).fill_bytes(0x5A));
  HostTensor v_cache_ = std::move(HostTensor(DType::bf16, {3, 4, 2, 16}).fill_bytes(0x5A));
  std::vector<std::int64_t> slots_ = {0, 11, -1, 5};
  ReshapeAndCacheFlashArgs args_;
  std::string message_;
};

TEST_F(ReshapeAndCacheErrorTest, Slots) {
  slots_[3] = 12;
  EXPECT_EQ(blamed([](auto&) {}), "slot_mapping");
  EXPECT_EQ(message_,
            "[reshape_and_cache_flash] argument 'slot_mapping': expected slots below 12, the "
            "capacity of the cache, got 12 at index 3");
  slots_[3] = INT64_MAX;
  EXPECT_EQ(blamed([](auto&) {}), "slot_mapping");
  slots_ = {-1, INT64_MIN, -5, -2};
  EXPECT_EQ(blamed([](auto&) {}), "nothing") << "negative slots are skipped";
  slots_.resize(6, -1);
  const auto slots = [&](std::int64_t n) {
    return ConstTensorView(slots_.data(), DType::i64, {n});
  };
  EXPECT_EQ(blamed([&](auto& a) { a.slot_mapping = slots(6); }), "slot_mapping");
  EXPECT_EQ(blamed([&](auto& a) { a.slot_mapping = slots(5); }), "nothing");
  EXPECT_EQ(blamed([&](auto& a) { a.slot_mapping.dtype = DType::i32; }), "slot_mapping");
  EXPECT_EQ(blamed([&](auto& a) {
              a.slot_mapping.strides[0] = 2;
              a.slot_mapping.shape[0] = 2;
            }),
            "slot_mapping");
}

TEST_F(ReshapeAndCacheErrorTest, RanksShapesAndTypes) {
  EXPECT_EQ(blamed([](auto& a) { a.key = a.key.select(0, 0); }), "key");
  EXPECT_EQ(blamed([](auto& a) { a.key.dtype = DType::i8; }), "key");
  EXPECT_EQ(blamed([](auto& a) { a.value.dtype = DType::f16; }), "value");
  EXPECT_EQ(blamed([](auto& a) { a.value.shape[0] = 4; }), "value");
  EXPECT_EQ(blamed([](auto& a) { a.value.shape[1] = 1; }), "value");
  EXPECT_EQ(blamed([](auto& a) { a.key_cache.dtype = DType::f16; }), "key_cache");
  EXPECT_EQ(blamed([](auto& a) { a.key_cache.shape[2] = 1; }), "key_cache");
  EXPECT_EQ(blamed([](auto& a) { a.key_cache.shape[3] = 4; }), "key_cache");
  EXPECT_EQ(blamed([](auto& a) { a.value_cache.shape[3] = 8; }), "value_cache");
  EXPECT_EQ(blamed([](auto& a) { a.value_cache.shape[0] = 2; }), "value_cache");
  EXPECT_EQ(blamed([](auto& a) { a.value_cache.shape[1] = 2; }), "value_cache");
  EXPECT_EQ(blamed([](auto& a) { a.value_cache = a.value_cache.select(0, 0); }), "value_cache");
}

TEST_F(ReshapeAndCacheErrorTest, PointersAndDevices) {
  EXPECT_EQ(blamed([](auto& a) { a.key.data = nullptr; }), "key");
  EXPECT_EQ(blamed([](auto& a) { a.value_cache.data = nullptr; }), "value_cache");
  EXPECT_EQ(blamed([](auto& a) { a.slot_mapping.data = nullptr; }), "slot_mapping");
  EXPECT_EQ(
      blamed([](auto& a) { a.key_cache.data = static_cast<std::byte*>(a.key_cache.data) + 1; }),
      "key_cache");
  EXPECT_EQ(blamed([](auto& a) { a.value.device.type = DeviceType::cuda; }), "value");
}

TEST_F(ReshapeAndCacheErrorTest, Strides) {
  EXPECT_EQ(blamed([](auto& a) {
              a.key.strides[2] = 2;
              a.key.shape[2] = 4;
            }),
            "key");
  EXPECT_EQ(blamed([](auto& a) { std::swap(a.value_cache.strides[3], a.value_cache.strides[2]); }),
            "value_cache");
  EXPECT_EQ(blamed([](auto& a) { a.key_cache.strides[0] = 0; }), "key_cache");
  EXPECT_EQ(blamed([](auto& a) { a.key_cache.strides[2] = 4; }), "key_cache");
}

TEST_F(ReshapeAndCacheErrorTest, Overlap) {
  EXPECT_EQ(blamed([](auto& a) {
              a.value = a.key;
              a.value_cache = a.key_cache;
            }),
            "value_cache");
  EXPECT_EQ(
      blamed([](auto& a) { a.key = ConstTensorView(a.value_cache.data, DType::bf16, {5, 2, 8}); }),
      "value_cache");
  EXPECT_EQ(blamed([&](auto& a) {
              a.slot_mapping = ConstTensorView(a.key_cache.data, DType::i64, {4});
              k_cache_.fill_bytes(0xFF);  // all slots -1
            }),
            "key_cache, but wrote")
      << "the fill above is the only write";
}

}  // namespace
}  // namespace attend
