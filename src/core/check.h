// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <fmt/format.h>

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "attend/core/error.h"
#include "attend/core/tensor_view.h"

/// Validation that the ops share. Every function throws InvalidArgument in the house format and
/// costs no allocation when the input is good.
namespace attend::check {

/// Op and argument that an error names.
struct Where {
  std::string_view op;
  std::string_view argument;
};

/// Text for the "expected" or "got" part: a string, a number, or a callable that makes one of them
/// (so that formatting costs nothing on the good path).
template <typename T>
std::string text_of(const T& value) {
  if constexpr (std::invocable<const T&>) {
    return text_of(value());
  } else {
    return fmt::format("{}", value);
  }
}

template <typename Expected, typename Got>
[[noreturn]] void fail(Where where, const Expected& expected, const Got& got) {
  throw InvalidArgument(where.op, where.argument, text_of(expected), text_of(got));
}

template <typename Expected, typename Got>
void require(bool ok, Where where, const Expected& expected, const Got& got) {
  if (!ok) fail(where, expected, got);
}

/// Rank, element type (empty list = any), CPU device, sizes >= 0 that fit 2^60 bytes, and a data
/// pointer that is aligned to the element size and not null unless the tensor is empty.
void tensor(Where where, const ConstTensorView& t, int rank, std::initializer_list<DType> dtypes);

/// @pre check::tensor passed. -1 in `shape` = any size. Got names the whole tensor.
void shape(Where where, const ConstTensorView& t, std::initializer_list<std::int64_t> shape);

/// The last dimension has stride 1 (or at most one element).
void unit_last_stride(Where where, const ConstTensorView& t);

void contiguous(Where where, const ConstTensorView& t);

/// No element is stored at the place of another one (a written tensor may not broadcast).
void distinct_elements(Where where, const ConstTensorView& t);

/// Addresses from the first to past the last byte that a view touches; empty if it has no element.
struct ByteRange {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
};
ByteRange byte_range(const ConstTensorView& t) noexcept;

/// True if some byte belongs to an element of both views. Views that only interleave (K and V
/// planes of one cache, slices of one fused tensor) do not overlap. Where that cannot be decided
/// with little work, which no usual layout reaches, the answer is true.
bool overlaps(const ConstTensorView& a, const ConstTensorView& b) noexcept;

/// `where` is the written tensor.
void no_overlap(Where where, const ConstTensorView& written, std::string_view other_name,
                const ConstTensorView& other);

/// Both views are the same elements in the same order.
bool same_view(const ConstTensorView& a, const ConstTensorView& b) noexcept;

/// A contiguous rank-1 tensor of `count` elements (-1 = any), as a span.
std::span<const std::int32_t> i32_array(Where where, const ConstTensorView& t, std::int64_t count);
std::span<const std::int64_t> i64_array(Where where, const ConstTensorView& t, std::int64_t count);

}  // namespace attend::check
