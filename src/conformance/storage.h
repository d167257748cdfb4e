// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "attend/core/tensor_view.h"
#include "conformance/rng.h"

namespace attend::conformance {

/// How a tensor lies in memory.
struct Layout {
  std::vector<int> order;  ///< physical dimension i is logical dimension order[i]; empty = identity
  bool padded = false;     ///< random gaps between rows of every dimension
  /// Elements between consecutive indices of the outermost physical dimension, as if other layers
  /// lay in between; 0 = none.
  std::int64_t outer_gap = 0;
};

/// Memory of one tensor of a random problem, surrounded by guard bytes. Every byte starts as 0xff:
/// NaN in each floating-point format, so that reading what must not be read shows in the result.
class Storage {
 public:
  Storage() = default;
  Storage(Storage&&) = default;
  Storage& operator=(Storage&&) = default;
  Storage(const Storage&) = delete;  // the view points into the bytes
  Storage& operator=(const Storage&) = delete;
  ~Storage() = default;
  Storage(Rng& rng, DType dtype, std::vector<std::int64_t> shape, const Layout& layout = {});

  TensorView view() const noexcept { return view_; }
  std::int64_t offset(std::initializer_list<std::int64_t> index) const noexcept;
  /// Element as a double, at an offset in elements from the view's data.
  double get(std::int64_t offset) const noexcept;
  /// Stores a value rounded to the dtype.
  void set(std::int64_t offset, double value) noexcept;
  /// Fills the elements `[offset, offset + n)` with bell-shaped values of that size.
  void set_random(Rng& rng, std::int64_t offset, std::int64_t n, double magnitude);
  /// Fills every element so.
  void set_random(Rng& rng, double magnitude);

  /// Offsets of all elements, in logical row-major order.
  std::vector<std::int64_t> offsets() const;

  /// Remembers the memory as it is now as the state before the op.
  void freeze() { before_ = bytes_; }
  /// Puts the state before the op back and expects no change. @pre freeze().
  void reset();
  /// Expects the element to be as it is now: writing it was allowed.
  void accept(std::int64_t offset) noexcept;
  /// Expects the element to become this value, rounded to the dtype.
  void expect_value(std::int64_t offset, double value);
  /// Expects the element to become a bitwise copy of another one.
  void expect_copy(std::int64_t offset, const Storage& from, std::int64_t from_offset) noexcept;
  /// Same for an element of this storage, as it is expected to be by now.
  void expect_copy_within(std::int64_t offset, std::int64_t from_offset) noexcept;
  /// Expects the element to have these bits (as many low bytes of `bits` as the dtype has).
  void expect_bits(std::int64_t offset, std::uint64_t bits) noexcept;
  /// Expects an f32 element to be this value, bit for bit.
  void expect_f32(std::int64_t offset, float value) noexcept;
  /// Fills every element with random bits (any value of an integer type).
  void set_random_bits(Rng& rng);
  /// Text that names the first byte that is not as expected; empty if none.
  std::string damage() const;

 private:
  std::size_t byte_of(std::int64_t offset) const noexcept {
    return begin_ + static_cast<std::size_t>(offset) * size_of(view_.dtype);
  }
  std::vector<std::byte> bytes_, before_, expected_;
  std::size_t begin_ = 0;  ///< of the view's first element
  TensorView view_;
};

/// A contiguous i32 array.
Storage int_storage(Rng& rng, std::span<const std::int32_t> values);

}  // namespace attend::conformance
