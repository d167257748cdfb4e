// SPDX-License-Identifier: Apache-2.0
#include "batch.h"

#include <fmt/format.h>

#include <limits>

namespace attend::python {
namespace {

std::int64_t integer_at(const TensorView& t, std::int64_t i) {
  const std::int64_t at = i * t.strides[0];
  switch (t.dtype) {
    case DType::i64:
      return t.as<std::int64_t>()[at];
    case DType::i32:
      return t.as<std::int32_t>()[at];
    case DType::i8:
      return t.as<std::int8_t>()[at];
    default:
      return t.as<std::uint8_t>()[at];
  }
}

std::vector<std::int64_t> read_tensor(Arguments& call, const char* name, nb::handle value) {
  Imports imports;
  const TensorView t = view_of(value, framework_of(value), {call.function(), name}, false, imports);
  if (t.rank != 1) call.refuse(name, "one dimension", describe(t));
  if (t.dtype != DType::i64 && t.dtype != DType::i32 && t.dtype != DType::i8 &&
      t.dtype != DType::u8)
    call.refuse(name, "integers", describe(t));
  std::vector<std::int64_t> values(static_cast<std::size_t>(t.shape[0]));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = integer_at(t, static_cast<std::int64_t>(i));
  return values;
}

}  // namespace

std::vector<std::int64_t> read_i64(Arguments& call, const char* name) {
  const nb::handle value = call.object(name);
  if (!value.is_valid()) return {};
  if (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr())) return call.integers(name);
  if (framework_of(value) == Framework::none)
    call.refuse_type(name, "a list, a tuple or a tensor of integers", value);
  return read_tensor(call, name, value);
}

std::vector<std::int32_t> read_i32(Arguments& call, const char* name) {
  constexpr std::int64_t kLow = std::numeric_limits<std::int32_t>::min(),
                         kHigh = std::numeric_limits<std::int32_t>::max();
  std::vector<std::int32_t> values;
  for (const std::int64_t x : read_i64(call, name)) {
    if (x < kLow || x > kHigh) call.refuse(name, "integers of 32 bits", fmt::format("{}", x));
    values.push_back(static_cast<std::int32_t>(x));
  }
  return values;
}

}  // namespace attend::python
