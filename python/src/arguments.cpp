// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"

#include <fmt/format.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "attend/core/cpu.h"

namespace attend::python {
namespace {

std::string shown(nb::handle value) {
  std::string text;
  try {
    text = nb::cast<std::string>(nb::repr(value));
  } catch (...) {  // repr() of a stranger's object may raise, or be no valid text
    PyErr_Clear();
    text = nb::cast<std::string>(nb::type_name(value.type()));
  }
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

/// An int, or what acts as one (numpy's integers); not bool, not float.
bool is_integer(nb::handle value) {
  return !PyBool_Check(value.ptr()) && PyIndex_Check(value.ptr());
}

/// The literal as a string of Python, made once: a lookup by it compares addresses.
PyObject* interned(const char* literal) {
  static auto& strings = *new std::unordered_map<const char*, PyObject*>;
  PyObject*& string = strings[literal];
  if (string == nullptr) string = PyUnicode_InternFromString(literal);
  return string;
}

}  // namespace

void Arguments::refuse_type(const char* name, std::string_view expected, nb::handle got) const {
  throw InvalidType(function_, name, expected, shown(got));
}

nb::handle Arguments::take(const char* name) {
  taken_.push_back(name);
  PyObject* value = PyDict_GetItem(values_.ptr(), interned(name));
  if (value != nullptr) ++num_given_;
  return value == nullptr || value == Py_None ? nb::handle() : nb::handle(value);
}

nb::handle Arguments::object(const char* name) { return take(name); }

TensorView Arguments::tensor(const char* name, bool writable) {
  const nb::handle value = take(name);
  return value.is_valid() ? tensor(name, value, writable) : TensorView();
}

TensorView Arguments::tensor(const char* name, nb::handle value, bool writable) {
  const Framework framework = framework_of(value);
  if (framework != Framework::none) {
    if (first_tensor_ == nullptr) {
      framework_ = framework;
      first_tensor_ = name;
    } else if (framework != framework_) {
      refuse(name, fmt::format("a {} tensor, as {} is", to_string(framework_), first_tensor_),
             fmt::format("a {} tensor", to_string(framework)));
    }
  }
  return view_of(value, framework, {function_, name}, writable, imports_);
}

std::vector<nb::object> Arguments::sequence(const char* name) {
  const nb::handle value = take(name);
  std::vector<nb::object> items;
  if (!value.is_valid()) return items;
  if (!PyList_Check(value.ptr()) && !PyTuple_Check(value.ptr()))
    refuse_type(name, "a list or tuple", value);
  for (const nb::handle item : value) items.push_back(nb::borrow(item));
  return items;
}

std::vector<ConstTensorView> Arguments::in_list(const char* name) {
  std::vector<ConstTensorView> views;
  for (const nb::object& item : sequence(name)) views.push_back(tensor(name, item, false));
  return views;
}

std::vector<TensorView> Arguments::out_list(const char* name) {
  std::vector<TensorView> views;
  for (const nb::object& item : sequence(name)) views.push_back(tensor(name, item, true));
  return views;
}

bool Arguments::boolean(const char* name, bool otherwise) {
  const nb::handle value = take(name);
  if (!value.is_valid()) return otherwise;
  if (!PyBool_Check(value.ptr())) refuse_type(name, "True or False", value);
  return value.ptr() == Py_True;
}

std::int64_t Arguments::integer(const char* name, std::int64_t otherwise) {
  const nb::handle value = take(name);
  return value.is_valid() ? integer_of(name, value) : otherwise;
}

std::int64_t Arguments::integer_of(const char* name, nb::handle value) const {
  if (!is_integer(value)) refuse_type(name, "an integer", value);
  const auto number = nb::steal(PyNumber_Index(value.ptr()));
  int overflow = 0;
  const long long result =
      number.is_valid() ? PyLong_AsLongLongAndOverflow(number.ptr(), &overflow) : 0;
  if (!number.is_valid()) {
    PyErr_Clear();
    refuse_type(name, "an integer", value);
  }
  if (overflow != 0) refuse(name, "an integer of 64 bits", shown(value));
  return result;
}

int Arguments::small_integer(const char* name, int otherwise) {
  const nb::handle value = take(name);
  return value.is_valid() ? small_integer_of(name, value) : otherwise;
}

int Arguments::small_integer_of(const char* name, nb::handle given) const {
  const std::int64_t value = integer_of(name, given);
  if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max())
    refuse(name, "an integer of 32 bits", fmt::format("{}", value));
  return static_cast<int>(value);
}

std::optional<int> Arguments::optional_integer(const char* name) {
  const nb::handle value = take(name);
  if (!value.is_valid()) return std::nullopt;
  return small_integer_of(name, value);
}

double Arguments::number(const char* name, double otherwise) {
  const nb::handle value = take(name);
  return value.is_valid() ? number_of(name, value) : otherwise;
}

double Arguments::number_of(const char* name, nb::handle value) const {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (PyBool_Check(value.ptr()) || !PyNumber_Check(value.ptr()) ||
      framework_of(value) != Framework::none)
    refuse_type(name, "a number", value);
  const double result = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    refuse_type(name, "a number", value);
  }
  return result;
}

std::optional<float> Arguments::optional_number(const char* name) {
  const nb::handle value = take(name);
  if (!value.is_valid()) return std::nullopt;
  return static_cast<float>(number_of(name, value));
}

std::optional<std::string> Arguments::text(const char* name) {
  const nb::handle value = take(name);
  if (!value.is_valid()) return std::nullopt;
  if (!PyUnicode_Check(value.ptr())) refuse_type(name, "a string", value);
  return nb::cast<std::string>(nb::borrow<nb::str>(value));
}

std::vector<float> Arguments::numbers(const char* name) {
  std::vector<float> values;
  for (const nb::object& item : sequence(name)) {
    const double x = PyFloat_AsDouble(item.ptr());
    if (PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      refuse_type(name, "numbers", item);
    }
    values.push_back(static_cast<float>(x));
  }
  return values;
}

std::vector<std::int64_t> Arguments::integers(const char* name) {
  std::vector<std::int64_t> values;
  for (const nb::object& item : sequence(name)) {
    const long long x = is_integer(item) ? PyLong_AsLongLong(item.ptr()) : 0;
    if (!is_integer(item) || PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      refuse_type(name, "integers of 64 bits", item);
    }
    values.push_back(x);
  }
  return values;
}

std::optional<DType> Arguments::dtype(const char* name) {
  const std::optional<std::string> word = text(name);
  if (!word) return std::nullopt;
  const std::optional<DType> dtype = parse_dtype(*word);
  if (!dtype) refuse(name, "the name of a type, like bf16", *word);
  return dtype;
}

std::optional<IsaLevel> Arguments::isa() {
  const std::optional<std::string> word = text("isa");
  if (!word) return std::nullopt;
  const std::optional<IsaLevel> isa = parse_isa(*word);
  if (!isa) refuse("isa", "the name of a level, like avx2", *word);
  return isa;
}

KernelOptions Arguments::kernels() {
  KernelOptions options;
  options.isa = isa();
  if (const auto word = text("arithmetic")) {
    const std::optional<Arithmetic> arithmetic = parse_arithmetic(*word);
    if (!arithmetic) refuse("arithmetic", "automatic, exact or fast", *word);
    options.arithmetic = *arithmetic;
  }
  return options;
}

void Arguments::done() const {
  if (num_given_ == static_cast<std::size_t>(PyDict_Size(values_.ptr()))) return;
  for (const auto& [key, value] : values_) {
    const auto word = nb::cast<std::string>(key);
    if (std::ranges::find(taken_, word) == taken_.end())
      throw InvalidType(function_, word, "no such argument", shown(value));
  }
}

Executor& Arguments::take_executor() {
  const nb::handle value = take("executor");
  if (!value.is_valid()) return executor_for(framework_);
  ThreadPool* pool = nullptr;
  if (!nb::try_cast(value, pool)) refuse_type("executor", "an attend.ThreadPool, or None", value);
  return pool->executor();
}

}  // namespace attend::python
