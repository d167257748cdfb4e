// SPDX-License-Identifier: Apache-2.0
#include "core/check.h"

#include <algorithm>
#include <array>

namespace attend::check {
namespace {

constexpr std::int64_t kMaxBytes = std::int64_t{1} << 60;

std::string join_dtypes(std::initializer_list<DType> dtypes) {
  std::string text;
  for (const DType t : dtypes) {
    if (!text.empty()) text += " or ";
    text += to_string(t);
  }
  return text;
}

// True if the product of sizes and the reach of strides stay below 2^60 bytes.
bool fits(const ConstTensorView& t) noexcept {
  const auto item = static_cast<std::int64_t>(size_of(t.dtype));
  std::int64_t bytes = item;
  std::int64_t reach = item;
  for (int i = 0; i < t.rank; ++i) {
    std::int64_t step = 0;
    if (__builtin_mul_overflow(bytes, t.shape[i], &bytes) || bytes > kMaxBytes) return false;
    if (t.shape[i] < 2) continue;
    if (t.strides[i] == INT64_MIN) return false;
    const std::int64_t stride = std::abs(t.strides[i]);
    if (__builtin_mul_overflow(stride, t.shape[i] - 1, &step) ||
        __builtin_mul_overflow(step, item, &step) || __builtin_add_overflow(reach, step, &reach) ||
        reach > kMaxBytes) {
      return false;
    }
  }
  return true;
}

std::string describe_strides(const ConstTensorView& t) {
  std::string text = describe(t) + " with strides [";
  for (int i = 0; i < t.rank; ++i) text += (i == 0 ? "" : ", ") + fmt::to_string(t.strides[i]);
  return text + "]";
}

template <typename T>
std::span<const T> array(Where where, const ConstTensorView& t, std::int64_t count, DType dtype) {
  tensor(where, t, 1, {dtype});
  if (count >= 0) shape(where, t, {count});
  contiguous(where, t);
  return {t.as<T>(), static_cast<std::size_t>(t.shape[0])};
}

}  // namespace

void tensor(Where where, const ConstTensorView& t, int rank, std::initializer_list<DType> dtypes) {
  require(
      t.rank == rank, where, [&] { return fmt::format("rank {}", rank); },
      [&] {
        return t.rank < 0 || t.rank > kMaxRank ? fmt::format("rank {}", t.rank)
               : t.rank == 0 && !t.defined()   ? std::string("an undefined tensor")
                                               : describe(t);
      });
  require(
      dtypes.size() == 0 || std::ranges::find(dtypes, t.dtype) != dtypes.end(), where,
      [&] { return fmt::format("dtype {}", join_dtypes(dtypes)); }, [&] { return describe(t); });
  require(t.device.type == DeviceType::cpu, where, "a cpu tensor", [&] { return describe(t); });
  for (int i = 0; i < rank; ++i) {
    require(t.shape[i] >= 0, where, "sizes >= 0", [&] { return describe(t); });
  }
  require(fits(t), where, "at most 2^60 bytes", [&] { return describe_strides(t); });
  require(t.defined() || t.numel() == 0, where, "a data pointer",
          [&] { return "null for " + describe(t); });
  const auto address = reinterpret_cast<std::uintptr_t>(t.data);
  require(
      address % size_of(t.dtype) == 0, where,
      [&] { return fmt::format("data aligned to {} bytes", size_of(t.dtype)); },
      [&] { return fmt::format("address {:#x}", address); });
}

void shape(Where where, const ConstTensorView& t, std::initializer_list<std::int64_t> shape) {
  const auto matches = [&] {
    if (static_cast<int>(shape.size()) != t.rank) return false;
    return std::equal(
        shape.begin(), shape.end(), t.shape.begin(),
        [](std::int64_t want, std::int64_t have) { return want < 0 || want == have; });
  };
  const auto expected = [&] {
    std::string text = "shape [";
    for (const std::int64_t n : shape) {
      if (text.back() != '[') text += ", ";
      text += n < 0 ? "any" : fmt::to_string(n);
    }
    return text + "]";
  };
  require(matches(), where, expected, [&] { return describe(t); });
}

void unit_last_stride(Where where, const ConstTensorView& t) {
  const int last = t.rank - 1;
  require(last < 0 || t.shape[last] <= 1 || t.strides[last] == 1, where,
          "stride 1 in the last dimension", [&] { return describe_strides(t); });
}

void contiguous(Where where, const ConstTensorView& t) {
  require(t.is_contiguous() || t.numel() == 0, where, "a contiguous tensor",
          [&] { return describe_strides(t); });
}

void distinct_elements(Where where, const ConstTensorView& t) {
  if (t.numel() == 0) return;
  // Insertion sort by stride: few entries.
  std::array<int, kMaxRank> order{};
  int count = 0;
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] < 2) continue;
    int at = count++;
    for (; at > 0; --at) {
      const int before = order[static_cast<std::size_t>(at - 1)];
      if (std::abs(t.strides[before]) <= std::abs(t.strides[i])) break;
      order[static_cast<std::size_t>(at)] = before;
    }
    order[static_cast<std::size_t>(at)] = i;
  }
  std::int64_t reach = 0;  // of the dimensions with smaller strides
  for (int k = 0; k < count; ++k) {
    const int i = order[static_cast<std::size_t>(k)];
    const std::int64_t stride = std::abs(t.strides[i]);
    require(stride > reach, where, "a tensor whose elements do not share memory",
            [&] { return describe_strides(t); });
    reach += stride * (t.shape[i] - 1);
  }
}

void no_overlap(Where where, const ConstTensorView& written, std::string_view other_name,
                const ConstTensorView& other) {
  require(
      !overlaps(written, other), where,
      [&] { return fmt::format("memory apart from '{}'", other_name); },
      [&] {
        const ByteRange x = byte_range(written);
        const ByteRange y = byte_range(other);
        return fmt::format("[{:#x}, {:#x}) and [{:#x}, {:#x})", x.begin, x.end, y.begin, y.end);
      });
}

bool same_view(const ConstTensorView& a, const ConstTensorView& b) noexcept {
  if (a.data != b.data || a.dtype != b.dtype || a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
    if (a.shape[i] > 1 && a.strides[i] != b.strides[i]) return false;
  }
  return true;
}

std::span<const std::int32_t> i32_array(Where where, const ConstTensorView& t, std::int64_t count) {
  return array<std::int32_t>(where, t, count, DType::i32);
}

std::span<const std::int64_t> i64_array(Where where, const ConstTensorView& t, std::int64_t count) {
  return array<std::int64_t>(where, t, count, DType::i64);
}

}  // namespace attend::check
