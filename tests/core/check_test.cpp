// SPDX-License-Identifier: Apache-2.0
#include "core/check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <limits>
#include <set>

#include "support/random.h"

namespace attend {
namespace {

constexpr check::Where kWhere{"op", "x"};

template <typename F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "nothing thrown";
}

class CheckTest : public ::testing::Test {
 protected:
  alignas(64) std::array<float, 64> data_{};
  TensorView view_{data_.data(), DType::f32, {2, 3, 4}};
};

TEST_F(CheckTest, AcceptsAGoodTensor) {
  EXPECT_NO_THROW(check::tensor(kWhere, view_, 3, {DType::f16, DType::f32}));
  EXPECT_NO_THROW(check::tensor(kWhere, view_, 3, {}));
  EXPECT_NO_THROW(check::tensor(kWhere, TensorView(nullptr, DType::f32, {0, 3}), 2, {DType::f32}));
}

TEST_F(CheckTest, NamesWhatIsWrong) {
  const auto tensor = [&] { check::tensor(kWhere, view_, 3, {DType::f32, DType::bf16}); };
  view_.rank = 2;
  EXPECT_EQ(message_of(tensor), "[op] argument 'x': expected rank 3, got [2, 3] f32 cpu:0");
  view_ = {};
  EXPECT_EQ(message_of(tensor), "[op] argument 'x': expected rank 3, got an undefined tensor");
  view_ = TensorView(data_.data(), DType::i32, {2, 3, 4});
  EXPECT_EQ(message_of(tensor),
            "[op] argument 'x': expected dtype f32 or bf16, got [2, 3, 4] i32 cpu:0");
  view_ = TensorView(nullptr, DType::f32, {2, 3, 4});
  EXPECT_EQ(message_of(tensor),
            "[op] argument 'x': expected a data pointer, got null for [2, 3, 4] f32 cpu:0");
  view_.data = reinterpret_cast<std::byte*>(data_.data()) + 2;
  EXPECT_NE(message_of(tensor).find("expected data aligned to 4 bytes"), std::string::npos);
  view_ = TensorView(data_.data(), DType::f32, {2, -3, 4});
  EXPECT_EQ(message_of(tensor), "[op] argument 'x': expected sizes >= 0, got [2, -3, 4] f32 cpu:0");
  view_ = TensorView(data_.data(), DType::f32, {2, 3, 4});
  view_.device.type = DeviceType::cuda;
  EXPECT_EQ(message_of(tensor),
            "[op] argument 'x': expected a cpu tensor, got [2, 3, 4] f32 cuda:0");
}

TEST_F(CheckTest, RefusesSizesAndStridesThatOverflow) {
  constexpr auto kMax = std::numeric_limits<std::int64_t>::max();
  TensorView t = view_;
  t.shape = {kMax, kMax, kMax};
  EXPECT_THROW(check::tensor(kWhere, t, 3, {}), InvalidArgument);
  t = view_;
  for (const std::int64_t stride : {kMax, -kMax, std::numeric_limits<std::int64_t>::min()}) {
    t.strides[1] = stride;
    EXPECT_THROW(check::tensor(kWhere, t, 3, {}), InvalidArgument) << stride;
  }
}

TEST_F(CheckTest, Shape) {
  EXPECT_NO_THROW(check::shape(kWhere, view_, {2, -1, 4}));
  EXPECT_EQ(message_of([&] { check::shape(kWhere, view_, {2, -1, 5}); }),
            "[op] argument 'x': expected shape [2, any, 5], got [2, 3, 4] f32 cpu:0");
  EXPECT_THROW(check::shape(kWhere, view_, {2, 3}), InvalidArgument);
}

TEST_F(CheckTest, Strides) {
  EXPECT_NO_THROW(check::unit_last_stride(kWhere, view_));
  EXPECT_NO_THROW(check::contiguous(kWhere, view_));
  const TensorView turned = view_.permute({0, 2, 1});
  EXPECT_THROW(check::unit_last_stride(kWhere, turned), InvalidArgument);
  EXPECT_EQ(message_of([&] { check::contiguous(kWhere, turned); }),
            "[op] argument 'x': expected a contiguous tensor, got [2, 4, 3] f32 cpu:0 with strides "
            "[12, 1, 4]");
  EXPECT_NO_THROW(check::unit_last_stride(kWhere, turned.slice(2, 0, 1)));
}

TEST_F(CheckTest, DistinctElements) {
  EXPECT_NO_THROW(check::distinct_elements(kWhere, view_));
  EXPECT_NO_THROW(check::distinct_elements(kWhere, view_.permute({2, 0, 1})));
  TensorView broadcast = view_;
  broadcast.strides[0] = 0;
  EXPECT_THROW(check::distinct_elements(kWhere, broadcast), InvalidArgument);
  broadcast.shape[0] = 1;
  EXPECT_NO_THROW(check::distinct_elements(kWhere, broadcast));
  TensorView crossing = view_;
  crossing.strides[0] = 11;
  EXPECT_THROW(check::distinct_elements(kWhere, crossing), InvalidArgument);
}

TEST_F(CheckTest, Overlap) {
  const TensorView row0 = view_.slice(0, 0, 1);
  const TensorView row1 = view_.slice(0, 1, 1);
  EXPECT_FALSE(check::overlaps(row0, row1));
  EXPECT_TRUE(check::overlaps(row0, view_));
  EXPECT_FALSE(check::overlaps(view_.slice(0, 0, 0), view_));
  // A view that runs backwards from its data pointer.
  TensorView backwards = row1.select(0, 0);
  backwards.strides[0] = -4;
  EXPECT_TRUE(check::overlaps(backwards, row0));
  EXPECT_THROW(check::no_overlap(kWhere, view_, "y", row0), InvalidArgument);
  EXPECT_NO_THROW(check::no_overlap(kWhere, row1, "y", row0));
}

TEST_F(CheckTest, InterleavedViewsDoNotOverlap) {
  // K and V planes of a cache [blocks, 2, tokens, 4] and a row of both.
  const TensorView cache(data_.data(), DType::f32, {4, 2, 2, 4});
  const TensorView k = cache.select(1, 0);
  const TensorView v = cache.select(1, 1);
  EXPECT_FALSE(check::overlaps(k, v));
  EXPECT_FALSE(check::overlaps(v, k));
  EXPECT_TRUE(check::overlaps(k, cache.select(2, 1)));
  EXPECT_TRUE(check::overlaps(k, k.slice(0, 3, 1)));
  EXPECT_FALSE(check::overlaps(k.slice(0, 0, 2), k.slice(0, 2, 2)));
  // Rows [4 | 2 | 2] of a fused tensor.
  const TensorView fused(data_.data(), DType::f32, {8, 8});
  EXPECT_FALSE(check::overlaps(fused.slice(1, 0, 4), fused.slice(1, 4, 2)));
  EXPECT_FALSE(check::overlaps(fused.slice(1, 4, 2), fused.slice(1, 6, 2)));
  EXPECT_TRUE(check::overlaps(fused.slice(1, 0, 5), fused.slice(1, 4, 2)));
  // Bytes of one element.
  TensorView half(reinterpret_cast<std::byte*>(data_.data()) + 2, DType::f16, {1});
  EXPECT_TRUE(check::overlaps(half, fused));
}

// All pairs of elements, compared one by one.
bool overlaps_by_enumeration(const TensorView& a, const TensorView& b) {
  const auto bytes_of = [](const TensorView& t) {
    std::set<std::uintptr_t> bytes;
    for (std::int64_t i = 0; i < t.numel(); ++i) {
      std::int64_t offset = 0;
      for (std::int64_t d = t.rank - 1, rest = i; d >= 0; rest /= t.shape[d--]) {
        offset += rest % t.shape[d] * t.strides[d];
      }
      const auto item = static_cast<std::int64_t>(size_of(t.dtype));
      for (std::int64_t k = 0; k < item; ++k) {
        bytes.insert(reinterpret_cast<std::uintptr_t>(t.data) +
                     static_cast<std::uintptr_t>(offset * item + k));
      }
    }
    return bytes;
  };
  const auto x = bytes_of(a);
  const auto y = bytes_of(b);
  return std::ranges::any_of(x, [&](std::uintptr_t p) { return y.contains(p); });
}

TEST_F(CheckTest, OverlapMatchesEnumeration) {
  testing::Rng rng(11);
  SCOPED_TRACE(rng.trace());
  const auto random_view = [&] {
    TensorView t;
    t.dtype = rng.chance(0.7) ? DType::f32 : DType::f16;
    t.data = reinterpret_cast<std::byte*>(data_.data()) + 2 * rng.integer(0, 40);
    t.rank = static_cast<int>(rng.integer(1, 3));
    for (int d = 0; d < t.rank; ++d) {
      t.shape[static_cast<std::size_t>(d)] = rng.integer(0, 4);
      t.strides[static_cast<std::size_t>(d)] = rng.integer(-9, 9);
    }
    return t;
  };
  int overlapping = 0;
  for (int round = 0; round < 5000; ++round) {
    const TensorView a = random_view();
    const TensorView b = random_view();
    const bool want = overlaps_by_enumeration(a, b);
    overlapping += want ? 1 : 0;
    ASSERT_EQ(check::overlaps(a, b), want) << round;
  }
  EXPECT_GT(overlapping, 500);
  EXPECT_LT(overlapping, 4500);
}

TEST_F(CheckTest, SameView) {
  EXPECT_TRUE(check::same_view(view_, view_));
  EXPECT_FALSE(check::same_view(view_, view_.permute({0, 2, 1})));
  EXPECT_FALSE(check::same_view(view_, view_.slice(0, 1, 1)));
  TensorView other = view_.slice(0, 0, 1);
  other.strides[0] = 77;  // a single element needs no stride
  EXPECT_TRUE(check::same_view(view_.slice(0, 0, 1), other));
}

TEST_F(CheckTest, IndexArrays) {
  const std::array<std::int32_t, 4> values = {1, 2, 3, 4};
  ConstTensorView t(values.data(), DType::i32, {4});
  EXPECT_EQ(check::i32_array(kWhere, t, 4)[3], 4);
  EXPECT_EQ(check::i32_array(kWhere, t, -1).size(), 4U);
  EXPECT_THROW(check::i32_array(kWhere, t, 5), InvalidArgument);
  EXPECT_THROW(check::i64_array(kWhere, t, 4), InvalidArgument);
  t.strides[0] = 2;
  t.shape[0] = 2;
  EXPECT_THROW(check::i32_array(kWhere, t, 2), InvalidArgument);
}

}  // namespace
}  // namespace attend
