// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "attend/core/error.h"
#include "attend/core/tensor_view.h"

/// Views of tensors that belong to Python: torch, numpy (with ml_dtypes) and whatever speaks
/// DLPack. Nothing is copied. Booleans are u8.
namespace attend::python {

namespace nb = nanobind;

/// A value of a wrong Python type: TypeError instead of ValueError.
class InvalidType : public InvalidArgument {
 public:
  using InvalidArgument::InvalidArgument;
};

/// Whose tensor it is. A call takes tensors of one framework.
enum class Framework : std::uint8_t { none, torch, numpy, dlpack };
const char* to_string(Framework f) noexcept;

/// The argument that a tensor is, for errors.
struct Place {
  const char* function;
  const char* argument;
};

/// What imported DLPack tensors keep alive, for as long as a call takes.
using Imports = std::vector<nb::ndarray<nb::ro>>;

/// Framework of an object; none for what is no tensor.
Framework framework_of(nb::handle object);

/// The tensor's view, never undefined: one without elements has some address.
/// @throws InvalidType for what is no tensor or has elements of another kind, InvalidArgument for
/// tensors elsewhere than on the CPU, of more than kMaxRank dimensions, or with strides that are
/// negative or no multiple of the element; with `writable` for read-only memory.
TensorView view_of(nb::handle object, Framework framework, const Place& place, bool writable,
                   Imports& imports);

}  // namespace attend::python
