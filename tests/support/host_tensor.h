// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstring>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <vector>

#include "attend/core/float_types.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "support/random.h"

namespace attend::testing {

/// Reads element `index` (one entry a dimension) of a float or integer view as a number.
inline double get(const ConstTensorView& t, std::initializer_list<std::int64_t> index) {
  std::int64_t offset = 0;
  int dim = 0;
  for (const std::int64_t i : index) offset += i * t.strides[dim++];
  switch (t.dtype) {
    case DType::f32:
      return t.as<float>()[offset];
    case DType::f16:
      return to_f32(t.as<f16>()[offset]);
    case DType::bf16:
      return to_f32(t.as<bf16>()[offset]);
    case DType::i32:
      return t.as<std::int32_t>()[offset];
    case DType::i64:
      return static_cast<double>(t.as<std::int64_t>()[offset]);
    default:
      throw std::logic_error("get: dtype without a rule");
  }
}

/// Owning contiguous zero-filled tensor, with `view` to hand to ops and to reshape at will.
class HostTensor {
 public:
  HostTensor(DType dtype, std::span<const std::int64_t> shape)
      : view_(nullptr, dtype, shape), buffer_(bytes_of(view_)) {
    view_.data = buffer_.data();
  }
  HostTensor(DType dtype, std::initializer_list<std::int64_t> shape)
      : HostTensor(dtype, std::span<const std::int64_t>(shape.begin(), shape.size())) {}

  TensorView view() const noexcept { return view_; }
  operator TensorView() const noexcept { return view_; }       // NOLINT
  operator ConstTensorView() const noexcept { return view_; }  // NOLINT
  std::int64_t numel() const noexcept { return view_.numel(); }
  std::size_t bytes() const noexcept { return buffer_.size(); }
  template <typename T>
  std::span<T> as() const noexcept {
    return {view_.as<T>(), static_cast<std::size_t>(view_.numel())};
  }

  /// Normal values times `scale`, rounded to the tensor's type (f32, f16 or bf16).
  HostTensor& fill_normal(Rng& rng, float scale = 1.0F) {
    return fill([&] { return scale * rng.normal(); });
  }
  /// Values in [low, high); cheaper than normal ones where their distribution does not matter.
  HostTensor& fill_uniform(Rng& rng, float low = -1.0F, float high = 1.0F) {
    return fill([&] { return rng.uniform(low, high); });
  }
  /// Each element from a call of `next`, rounded to the tensor's type.
  template <typename Next>
  HostTensor& fill(Next&& next) {
    const auto fill_as = [&]<typename T>(std::span<T> values) {
      for (T& v : values) v = from_f32<T>(next());
    };
    switch (view_.dtype) {
      case DType::f32:
        fill_as(as<float>());
        break;
      case DType::f16:
        fill_as(as<f16>());
        break;
      case DType::bf16:
        fill_as(as<bf16>());
        break;
      default:
        throw std::logic_error("fill: not a float tensor");
    }
    return *this;
  }
  HostTensor& fill_bytes(int value) noexcept {
    if (bytes() > 0) std::memset(buffer_.data(), value, bytes());
    return *this;
  }
  /// Copy of the raw bytes, to compare with later.
  std::vector<unsigned char> snapshot() const {
    const auto* p = static_cast<const unsigned char*>(buffer_.data());
    return {p, p + bytes()};
  }

 private:
  static std::size_t bytes_of(const TensorView& t) noexcept {
    return static_cast<std::size_t>(t.numel()) * size_of(t.dtype);
  }

  TensorView view_;
  Buffer buffer_;
};

}  // namespace attend::testing
