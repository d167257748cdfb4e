// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>

#include "attend/core/device.h"
#include "attend/core/dtype.h"

namespace attend {

inline constexpr int kMaxRank = 7;  ///< the cache of differential attention with its layers

/// Non-owning strided tensor: pointer, shape, strides (in elements, may be any that the op allows),
/// dtype, device. `Ptr` is `void` or `const void`.
template <typename Ptr>
class BasicTensorView {
 public:
  Ptr* data = nullptr;
  DType dtype = DType::f32;
  Device device;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};  ///< elements

  BasicTensorView() = default;
  /// Row-major contiguous view.
  BasicTensorView(Ptr* ptr, DType type, std::span<const std::int64_t> dims) noexcept
      : data(ptr), dtype(type), rank(static_cast<int>(dims.size())) {
    std::int64_t stride = 1;
    for (int i = rank - 1; i >= 0; --i) {
      shape[i] = dims[static_cast<std::size_t>(i)];
      strides[i] = stride;
      stride *= shape[i];
    }
  }
  BasicTensorView(Ptr* ptr, DType type, std::initializer_list<std::int64_t> dims) noexcept
      : BasicTensorView(ptr, type, std::span<const std::int64_t>(dims.begin(), dims.size())) {}
  /// A const view from a mutable one.
  template <typename Other>
    requires(std::is_const_v<Ptr> && !std::is_const_v<Other>)
  BasicTensorView(const BasicTensorView<Other>& o) noexcept  // NOLINT(google-explicit-constructor)
      : data(o.data),
        dtype(o.dtype),
        device(o.device),
        rank(o.rank),
        shape(o.shape),
        strides(o.strides) {}

  bool defined() const noexcept { return data != nullptr; }
  std::int64_t numel() const noexcept {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  bool is_contiguous() const noexcept {
    std::int64_t expect = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expect) return false;
      expect *= shape[i];
    }
    return true;
  }
  /// Same data with dimensions reordered: result dim i is this dim order[i].
  BasicTensorView permute(std::span<const int> order) const noexcept {
    BasicTensorView r = *this;
    for (int i = 0; i < rank; ++i) {
      r.shape[i] = shape[order[static_cast<std::size_t>(i)]];
      r.strides[i] = strides[order[static_cast<std::size_t>(i)]];
    }
    return r;
  }
  BasicTensorView permute(std::initializer_list<int> order) const noexcept {
    return permute(std::span<const int>(order.begin(), order.size()));
  }
  /// Drops dimension `dim`, fixed at `index` (unchecked).
  BasicTensorView select(int dim, std::int64_t index) const noexcept {
    BasicTensorView r = *this;
    r.data = offset(index * strides[dim]);
    for (int i = dim; i + 1 < rank; ++i) {
      r.shape[i] = shape[i + 1];
      r.strides[i] = strides[i + 1];
    }
    --r.rank;
    return r;
  }
  /// Keeps [begin, begin + length) of dimension `dim` (unchecked).
  BasicTensorView slice(int dim, std::int64_t begin, std::int64_t length) const noexcept {
    BasicTensorView r = *this;
    r.data = offset(begin * strides[dim]);
    r.shape[dim] = length;
    return r;
  }
  /// Typed pointer to the first element.
  template <typename T>
  auto as() const noexcept {
    using Out = std::conditional_t<std::is_const_v<Ptr>, const T, T>;
    return static_cast<Out*>(data);
  }

 private:
  Ptr* offset(std::int64_t elements) const noexcept {
    if (data == nullptr) return nullptr;  // views of an empty tensor
    using Byte = std::conditional_t<std::is_const_v<Ptr>, const std::byte, std::byte>;
    return static_cast<Byte*>(data) + elements * static_cast<std::int64_t>(size_of(dtype));
  }
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

/// "[4, 8, 128] bf16 cpu:0", for error messages.
std::string describe(const ConstTensorView& t);

}  // namespace attend
