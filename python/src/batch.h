// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "arguments.h"
#include "attend/batch/common_metadata.h"

namespace attend::python {

/// A batch and the tensor that it points to. Never changed once Python has it, so that arrays over
/// its vectors stay valid.
struct Batch {
  CommonMetadata common;
  nb::object block_table;  ///< the tensor of common.block_table, or None
  Imports imports;         ///< what keeps the memory of a DLPack tensor alive
};

/// A required argument that Python gives as the object of C++ type T; `kind` names it in errors.
template <typename T>
T& object_of(Arguments& call, const char* name, const char* kind) {
  const nb::handle value = call.object(name);
  T* result = nullptr;
  if (!value.is_valid() || !nb::try_cast(value, result) || result == nullptr)
    call.refuse_type(name, kind, value.is_valid() ? value : nb::handle(nb::none()));
  return *result;
}

/// Integers of a list, a tuple or a tensor of one dimension of any framework; empty = not given.
std::vector<std::int32_t> read_i32(Arguments& call, const char* name);
std::vector<std::int64_t> read_i64(Arguments& call, const char* name);

}  // namespace attend::python
