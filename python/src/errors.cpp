// SPDX-License-Identifier: Apache-2.0
#include "errors.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace attend::python {
namespace {

/// Raises attend.errors.NAME(text, ...).
template <typename... Args>
void raise(const char* name, const Args&... args) {
  try {
    const nb::object type = nb::module_::import_("attend.errors").attr(name);
    const nb::object error = type(args...);
    PyErr_SetObject(type.ptr(), error.ptr());
  } catch (nb::python_error& e) {
    e.restore();
  }
}

/// A C++ name as Python writes it.
std::string dotted(const std::string& text) {
  const std::size_t at = text.find("::");
  if (at == std::string::npos) return text;
  return text.substr(0, at) + "." + text.substr(at + 2);
}

void translate(const std::exception_ptr& p, void*) {
  try {
    std::rethrow_exception(p);
  } catch (const InvalidType& e) {
    raise("InvalidType", dotted(e.what()), dotted(e.op()), e.argument());
  } catch (const InvalidArgument& e) {
    raise("InvalidArgument", dotted(e.what()), dotted(e.op()), e.argument());
  } catch (const Unsupported& e) {
    raise("Unsupported", std::string(e.what()), e.reasons());
  } catch (const OutOfBlocks& e) {
    raise("OutOfBlocks", std::string(e.what()));
  } catch (const DeviceError& e) {
    raise("DeviceError", std::string(e.what()));
  } catch (const Error& e) {
    raise("Error", std::string(e.what()));
  }
}

}  // namespace

void bind_errors() { nb::register_exception_translator(translate); }

}  // namespace attend::python
