// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <vector>

#include "attend/oracle/attention.h"
#include "border.h"

namespace attend::python {

/// A numpy array of one dimension that owns the numbers.
inline nb::object numpy_array(std::vector<double> values) {
  auto* owned = new std::vector<double>(std::move(values));
  const nb::capsule owner(owned,
                          [](void* p) noexcept { delete static_cast<std::vector<double>*>(p); });
  return nb::cast(
      nb::ndarray<nb::numpy, double, nb::ndim<1>>(owned->data(), {owned->size()}, owner));
}

/// (out, out_bound, lse, lse_bound), each flat in row-major order of the tensor.
inline nb::tuple oracle_result(oracle::Result r) {
  return nb::make_tuple(numpy_array(std::move(r.out)), numpy_array(std::move(r.out_bound)),
                        numpy_array(std::move(r.lse)), numpy_array(std::move(r.lse_bound)));
}

}  // namespace attend::python
