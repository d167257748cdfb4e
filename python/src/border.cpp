// SPDX-License-Identifier: Apache-2.0
#include "border.h"

#include <fmt/format.h>
#include <nanobind/stl/string.h>

#include <array>
#include <optional>
#include <string>

#include "torch.h"

namespace attend::python {
namespace {

[[noreturn]] void refuse(const Place& place, std::string_view expected, std::string_view got) {
  throw InvalidArgument(place.function, place.argument, expected, got);
}
[[noreturn]] void refuse_type(const Place& place, std::string_view expected, std::string_view got) {
  throw InvalidType(place.function, place.argument, expected, got);
}

std::string name_of_type(nb::handle object) {
  return nb::cast<std::string>(nb::str(object.type().attr("__name__")));
}

constexpr const char* kKnownTypes =
    "elements of float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, uint8, bool, int32 "
    "or "
    "int64";

std::optional<DType> numpy_dtype(std::string_view name) noexcept {
  constexpr std::array<std::pair<std::string_view, DType>, 10> kNames = {
      {{"float32", DType::f32},
       {"float16", DType::f16},
       {"bfloat16", DType::bf16},
       {"float8_e4m3fn", DType::fp8_e4m3},
       {"float8_e5m2", DType::fp8_e5m2},
       {"int8", DType::i8},
       {"uint8", DType::u8},
       {"bool", DType::u8},
       {"int32", DType::i32},
       {"int64", DType::i64}}};
  for (const auto& [candidate, dtype] : kNames)
    if (candidate == name) return dtype;
  return std::nullopt;
}

std::optional<DType> dlpack_dtype(const nb::dlpack::dtype& d) noexcept {
  struct Known {
    int code, bits;
    DType dtype;
  };
  // Codes of the DLPack standard; those of 8-bit floats are newer than nanobind's names.
  constexpr int kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6, kE4m3fn = 10, kE5m2 = 12;
  constexpr std::array<Known, 10> kKnown = {{{kFloat, 32, DType::f32},
                                             {kFloat, 16, DType::f16},
                                             {kBfloat, 16, DType::bf16},
                                             {kE4m3fn, 8, DType::fp8_e4m3},
                                             {kE5m2, 8, DType::fp8_e5m2},
                                             {kInt, 8, DType::i8},
                                             {kUInt, 8, DType::u8},
                                             {kBool, 8, DType::u8},
                                             {kInt, 32, DType::i32},
                                             {kInt, 64, DType::i64}}};
  for (const Known& k : kKnown)
    if (d.lanes == 1 && d.code == k.code && d.bits == k.bits) return k.dtype;
  return std::nullopt;
}

void check_rank(const Place& place, std::size_t rank) {
  if (rank > static_cast<std::size_t>(kMaxRank))
    refuse(place, fmt::format("at most {} dimensions", kMaxRank), fmt::format("{}", rank));
}

/// Strides from bytes to elements.
void set_numpy_strides(TensorView& view, nb::handle strides, const Place& place) {
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  for (int i = 0; i < view.rank; ++i) {
    const auto bytes = nb::cast<std::int64_t>(strides[i]);
    if (bytes % size != 0)
      refuse(place, "strides that are multiples of the element's size",
             fmt::format("{} bytes", bytes));
    view.strides[static_cast<std::size_t>(i)] = bytes / size;
  }
}

TensorView numpy_view(nb::handle object, const Place& place, bool writable) {
  const nb::object dtype = object.attr("dtype");
  const auto name = nb::cast<std::string>(nb::str(dtype.attr("name")));
  const std::optional<DType> known = numpy_dtype(name);
  if (!known || !nb::cast<bool>(dtype.attr("isnative"))) refuse_type(place, kKnownTypes, name);
  const nb::object shape = object.attr("shape");
  check_rank(place, nb::len(shape));
  const nb::object memory = nb::object(object.attr("__array_interface__"))["data"];
  if (writable && nb::cast<bool>(memory[1])) refuse(place, "a writable array", "a read-only one");
  TensorView view;
  view.data = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(memory[0]));
  view.dtype = *known;
  view.rank = static_cast<int>(nb::len(shape));
  for (int i = 0; i < view.rank; ++i)
    view.shape[static_cast<std::size_t>(i)] = nb::cast<std::int64_t>(shape[i]);
  set_numpy_strides(view, object.attr("strides"), place);
  return view;
}

TensorView dlpack_view(nb::handle object, const Place& place, bool writable, Imports& imports) {
  nb::ndarray<nb::ro> tensor;
  nb::ndarray<> mutable_tensor;
  if (!nb::try_cast(object, tensor))
    refuse(place, "a tensor that DLPack can export", name_of_type(object));
  if (writable && !nb::try_cast(object, mutable_tensor))
    refuse(place, "a writable tensor", fmt::format("a read-only {}", name_of_type(object)));
  if (tensor.device_type() != nb::device::cpu::value)
    refuse(place, "a tensor on the CPU", fmt::format("DLPack device {}", tensor.device_type()));
  const std::optional<DType> dtype = dlpack_dtype(tensor.dtype());
  if (!dtype)
    refuse_type(place, kKnownTypes,
                fmt::format("DLPack type {} of {} bits", tensor.dtype().code, tensor.dtype().bits));
  check_rank(place, tensor.ndim());
  TensorView view;
  view.data = const_cast<void*>(tensor.data());
  view.dtype = *dtype;
  view.rank = static_cast<int>(tensor.ndim());
  for (std::size_t i = 0; i < tensor.ndim(); ++i) {
    view.shape[i] = static_cast<std::int64_t>(tensor.shape(i));
    view.strides[i] = tensor.stride(i);
  }
  imports.push_back(std::move(tensor));
  return view;
}

/// numpy.ndarray, null until somebody has imported numpy.
nb::handle numpy_array_type() {
  static PyObject* type = nullptr;
  if (type == nullptr) {
    const auto module = nb::steal(PyImport_GetModule(nb::str("numpy").ptr()));
    if (module.is_valid() && nb::hasattr(module, "ndarray"))
      type = nb::object(module.attr("ndarray")).release().ptr();
    PyErr_Clear();
  }
  return type;
}

}  // namespace

const char* to_string(Framework f) noexcept {
  constexpr std::array<const char*, 4> kNames = {"no", "torch", "numpy", "DLPack"};
  return kNames[static_cast<std::size_t>(f)];
}

Framework framework_of(nb::handle object) {
  if (is_torch_tensor(object)) return Framework::torch;
  const nb::handle array = numpy_array_type();
  if (array.is_valid() &&
      PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(array.ptr())))
    return Framework::numpy;
  if (nb::hasattr(object, "__dlpack__")) return Framework::dlpack;
  return Framework::none;
}

TensorView view_of(nb::handle object, Framework framework, const Place& place, bool writable,
                   Imports& imports) {
  TensorView view;
  switch (framework) {
    case Framework::torch:
      view = torch_view(object, place);
      break;
    case Framework::numpy:
      view = numpy_view(object, place, writable);
      break;
    case Framework::dlpack:
      view = dlpack_view(object, place, writable, imports);
      break;
    case Framework::none:
      refuse_type(place, "a tensor of torch, numpy or another library with DLPack",
                  name_of_type(object));
  }
  for (int i = 0; i < view.rank; ++i)
    if (view.strides[static_cast<std::size_t>(i)] < 0)
      refuse(place, "strides >= 0",
             fmt::format("{} in dimension {}", view.strides[static_cast<std::size_t>(i)], i));
  // Undefined views mean "not given", and some libraries have no address for no elements.
  alignas(64) static std::byte nothing[64];
  if (view.data == nullptr && view.numel() == 0) view.data = nothing;
  return view;
}

}  // namespace attend::python
