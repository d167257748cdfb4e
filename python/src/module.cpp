// SPDX-License-Identifier: Apache-2.0
#include "errors.h"
#include "executors.h"

namespace attend::python {

#define ATTEND_PYTHON_BINDING(name) void bind_##name(nb::module_& m);
#include "python_bindings.inc"
#undef ATTEND_PYTHON_BINDING

}  // namespace attend::python

NB_MODULE(_native, m) {
  using namespace attend::python;
  namespace nb = nanobind;
  m.doc() = "Bindings of the C++ library; attend's other modules are its interface.";
  // Objects that a program keeps until it ends (weights, a pool) are no mistakes to report.
  nb::set_leak_warnings(false);
  bind_errors();
  bind_executors(m);
#define ATTEND_PYTHON_BINDING(name) bind_##name(m);
#include "python_bindings.inc"
#undef ATTEND_PYTHON_BINDING
}
