// SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arguments.h"

namespace attend::python {
namespace {

nb::dlpack::dtype dlpack_type(DType dtype) {
  constexpr std::uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kE4m3fn = 10, kE5m2 = 12;
  const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
  switch (dtype) {
    case DType::f32:
    case DType::f16:
      return {kFloat, bits, 1};
    case DType::bf16:
      return {kBfloat, bits, 1};
    case DType::fp8_e4m3:
      return {kE4m3fn, bits, 1};
    case DType::fp8_e5m2:
      return {kE5m2, bits, 1};
    case DType::u8:
      return {kUInt, bits, 1};
    default:
      return {kInt, bits, 1};
  }
}

}  // namespace

void bind_tensors(nb::module_& m) {
  m.attr("__version__") = ATTEND_VERSION;
  m.def(
      "dlpack_tensor",
      [](const std::vector<std::size_t>& shape, const std::string& name) {
        const std::optional<DType> dtype = parse_dtype(name);
        if (!dtype)
          throw InvalidArgument("dlpack_tensor", "dtype", "the name of a type, like bfloat16",
                                name);
        std::size_t bytes = size_of(*dtype);
        for (const std::size_t n : shape) bytes *= n;
        auto* memory = new std::vector<std::byte>(bytes);
        const nb::capsule owner(
            memory, [](void* p) noexcept { delete static_cast<std::vector<std::byte>*>(p); });
        return nb::ndarray<>(memory->data(), shape.size(), shape.data(), owner, nullptr,
                             dlpack_type(*dtype));
      },
      nb::arg("shape"), nb::arg("dtype"));
}

}  // namespace attend::python
