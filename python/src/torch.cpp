// SPDX-License-Identifier: Apache-2.0
#include "torch.h"

#include <fmt/format.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <utility>

namespace attend::python {
namespace {

struct Torch {
  nb::object tensor, get_num_threads, is_grad_enabled, strided;
  std::vector<std::pair<nb::object, DType>> dtypes;

  explicit Torch(const nb::object& torch)
      : tensor(torch.attr("Tensor")),
        get_num_threads(torch.attr("get_num_threads")),
        is_grad_enabled(torch.attr("is_grad_enabled")),
        strided(torch.attr("strided")) {
    for (const auto& [name, dtype] : {std::pair{"float32", DType::f32},
                                      {"float16", DType::f16},
                                      {"bfloat16", DType::bf16},
                                      {"float8_e4m3fn", DType::fp8_e4m3},
                                      {"float8_e5m2", DType::fp8_e5m2},
                                      {"int8", DType::i8},
                                      {"uint8", DType::u8},
                                      {"bool", DType::u8},
                                      {"int32", DType::i32},
                                      {"int64", DType::i64}})
      if (nb::hasattr(torch, name)) dtypes.emplace_back(torch.attr(name), dtype);
  }
};

/// Null until the caller has imported torch. Lives as long as the process: it may be asked for
/// while the interpreter ends.
const Torch* torch() {
  static const Torch* instance = nullptr;
  if (instance == nullptr) {
    const auto module = nb::steal(PyImport_GetModule(nb::str("torch").ptr()));
    // A module that is still being imported has no tensors yet.
    if (module.is_valid() && nb::hasattr(module, "is_grad_enabled") &&
        nb::hasattr(module, "strided"))
      instance = new Torch(module);
    PyErr_Clear();
  }
  return instance;
}

/// Names of what is read of every tensor, made once: looking them up is most of a small call.
struct Names {
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
};
const Names& names() {
  static const Names instance;
  return instance;
}

nb::object attribute(nb::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) nb::raise_python_error();
  return nb::steal(value);
}
nb::object called(nb::handle object, PyObject* method) {
  PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (value == nullptr) nb::raise_python_error();
  return nb::steal(value);
}
bool is_true(const nb::object& value) { return value.ptr() == Py_True; }

std::optional<DType> dtype_of(const Torch& t, nb::handle object) {
  const nb::object dtype = attribute(object, names().dtype);
  for (const auto& [candidate, value] : t.dtypes)
    if (candidate.is(dtype)) return value;
  return std::nullopt;
}

/// The numbers of a tuple; symbols of a traced program are no numbers.
void read_sizes(nb::handle tuple, std::array<std::int64_t, kMaxRank>& sizes, int rank) {
  for (int i = 0; i < rank; ++i) {
    sizes[static_cast<std::size_t>(i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (PyErr_Occurred() != nullptr) nb::raise_python_error();
  }
}

[[noreturn]] void refuse(const Place& place, std::string_view expected, std::string_view got) {
  throw InvalidArgument(place.function, place.argument, expected, got);
}

std::string text(nb::handle h) { return nb::cast<std::string>(nb::str(h)); }

void check(const Torch& t, nb::handle object, const Place& place) {
  if (!is_true(attribute(object, names().is_cpu)))
    refuse(place, "a tensor on the CPU", text(object.attr("device")));
  if (!attribute(object, names().layout).is(t.strided))
    refuse(place, "a strided tensor", text(object.attr("layout")));
  if (is_true(attribute(object, names().requires_grad)) && is_true(t.is_grad_enabled()))
    refuse(place, "a tensor without gradients (inference only: use torch.no_grad())",
           "requires_grad=True");
  if (is_true(called(object, names().is_neg)))
    refuse(place, "a tensor whose memory has its values", "a view with the negative bit");
}

}  // namespace

bool is_torch_tensor(nb::handle object) {
  const Torch* t = torch();
  return t != nullptr &&
         PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(t->tensor.ptr()));
}

int torch_num_threads() { return nb::cast<int>(torch()->get_num_threads()); }

TensorView torch_view(nb::handle object, const Place& place) {
  const Torch& t = *torch();
  check(t, object, place);
  const std::optional<DType> dtype = dtype_of(t, object);
  if (!dtype)
    throw InvalidType(place.function, place.argument, "a tensor of numbers that attend knows",
                      text(object.attr("dtype")));
  TensorView view;
  view.dtype = *dtype;
  try {
    const nb::object shape = attribute(object, names().shape);
    const nb::object strides = called(object, names().stride);
    const auto rank = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    if (rank > kMaxRank)
      refuse(place, fmt::format("at most {} dimensions", kMaxRank), fmt::format("{}", rank));
    view.rank = rank;
    read_sizes(shape, view.shape, rank);
    read_sizes(strides, view.strides, rank);
    view.data = PyLong_AsVoidPtr(called(object, names().data_ptr).ptr());
    if (PyErr_Occurred() != nullptr) nb::raise_python_error();
  } catch (const nb::python_error& e) {  // fake, functional and other tensors without memory
    refuse(place, "a tensor with memory of its own", e.what());
  }
  return view;
}

}  // namespace attend::python
