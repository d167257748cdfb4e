// SPDX-License-Identifier: Apache-2.0
#include "attend/cache/cache_memory.h"

#include <fmt/format.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "attend/cache/kv_cache_spec.h"
#include "attend/cache/value_scales.h"
#include "configs.h"

namespace attend::python {
namespace {

void construct_memory(CacheMemory* self, const nb::kwargs& values) {
  Arguments call("CacheMemory", values);
  const std::int64_t bytes = call.integer("num_bytes", -1);
  const int fill = call.small_integer("fill", 0);
  CacheMemoryOptions options;
  options.huge_pages = call.boolean("huge_pages", true);
  if (bytes < 0) call.refuse("num_bytes", "a number >= 0", fmt::format("{}", bytes));
  if (fill < 0 || fill > 255) call.refuse("fill", "0 to 255", fmt::format("{}", fill));
  options.fill = static_cast<unsigned char>(fill);
  call.run([&](Executor& e) {
    options.executor = &e;
    new (self) CacheMemory(static_cast<std::size_t>(bytes), options);
  });
}

nb::dict report(const CacheMemory& memory) {
  const CacheMemoryReport& r = memory.report();
  nb::dict nodes;
  for (const NodeShare& share : r.nodes) nodes[nb::int_(share.node)] = share.bytes;
  nb::dict result;
  result["huge_pages_advised"] = r.huge_pages_advised;
  result["huge_pages_problem"] = r.huge_pages_problem;
  result["nodes"] = nodes;
  result["nodes_problem"] = r.nodes_problem;
  return result;
}

/// All of it as a numpy array of bytes, which keeps the memory alive.
nb::object bytes_of(nb::handle self) {
  static std::uint8_t nothing = 0;
  auto& memory = nb::cast<CacheMemory&>(self);
  auto* data = memory.size() == 0 ? &nothing : static_cast<std::uint8_t*>(memory.data());
  return nb::cast(nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(data, {memory.size()}, self));
}

template <typename Shape>
nb::tuple shape_of(const char* function, const nb::kwargs& values, Shape&& shape) {
  Arguments call(function, values);
  const KvCacheSpec spec = read_fields(call, "spec", read_cache_spec);
  call.done();
  return nb::tuple(nb::cast(shape(spec)));
}

/// Strides in elements of the logical dimensions.
nb::tuple cache_strides(const nb::kwargs& values) {
  Arguments call("cache_view", values);
  const std::vector<std::int64_t> shape = call.integers("shape");
  const std::vector<std::int64_t> dims = call.integers("order");
  call.done();
  const auto rank = static_cast<std::int64_t>(shape.size());
  std::vector<bool> seen(shape.size(), false);
  bool permutation = dims.size() == shape.size() && rank <= kMaxRank;
  for (std::size_t i = 0; permutation && i < dims.size(); ++i) {
    permutation = dims[i] >= 0 && dims[i] < rank && !seen[static_cast<std::size_t>(dims[i])];
    if (permutation) seen[static_cast<std::size_t>(dims[i])] = true;
  }
  if (!permutation)
    call.refuse(
        "order",
        fmt::format("a permutation of 0 .. {}, at most {} dimensions", shape.size() - 1, kMaxRank),
        nb::cast<std::string>(nb::repr(nb::cast(dims))));
  const std::vector<int> order(dims.begin(), dims.end());
  const TensorView view = cache_view(nullptr, DType::u8, shape, order);
  nb::list strides;
  for (int i = 0; i < view.rank; ++i) strides.append(view.strides[static_cast<std::size_t>(i)]);
  return nb::tuple(strides);
}

void bind_shapes(nb::module_& m) {
  m.def("flash_attn_cache_shape", [](const nb::kwargs& values) {
    return shape_of("flash_attn_cache_shape", values, flash_attn_cache_shape);
  });
  m.def("flash_attn_scale_shape", [](const nb::kwargs& values) {
    return shape_of("flash_attn_scale_shape", values, flash_attn_scale_shape);
  });
  m.def("mla_cache_shape", [](const nb::kwargs& values) {
    return shape_of("mla_cache_shape", values, mla_cache_shape);
  });
  m.def("stored_dtype", [](const nb::kwargs& values) {
    Arguments call("KvCacheSpec", values);
    const KvCacheSpec spec = read_fields(call, "spec", read_cache_spec);
    call.done();
    spec.validate();
    return std::string(to_string(spec.dtype));
  });
  m.def("flash_attn_stride_order", [](const nb::kwargs& values) {
    Arguments call("flash_attn_stride_order", values);
    const KvLayout layout = read_layout(call, "layout");
    const bool layers = call.boolean("include_layers", false);
    const KvFormat format = read_format(call, "format");
    call.done();
    return nb::tuple(nb::cast(flash_attn_stride_order(layout, layers, format)));
  });
  m.def("mla_stride_order", [](const nb::kwargs& values) {
    Arguments call("mla_stride_order", values);
    const bool layers = call.boolean("include_layers", false);
    call.done();
    return nb::tuple(nb::cast(mla_stride_order(layers)));
  });
  m.def("cache_strides", cache_strides);
}

ValueScales read_value_scales(Arguments& call) {
  ValueScales s;
  s.num_layers = call.small_integer("num_layers", 0);
  s.num_kv_heads = call.small_integer("num_kv_heads", 0);
  s.head_size = call.small_integer("head_size", 0);
  const ConstTensorView scales = call.in("scales");
  if (!scales.defined() || scales.dtype != DType::f32 || !scales.is_contiguous())
    call.refuse("scales", "contiguous float32", scales.defined() ? describe(scales) : "None");
  s.scales.assign(scales.as<float>(), scales.as<float>() + scales.numel());
  return s;
}

/// f32 [num_layers, num_kv_heads, head_size]
nb::object array_of(ValueScales s) {
  auto* owned = new std::vector<float>(std::move(s.scales));
  const nb::capsule owner(owned,
                          [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
  const auto size = [](int n) { return static_cast<std::size_t>(n); };
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<3>>(
      owned->data(), {size(s.num_layers), size(s.num_kv_heads), size(s.head_size)}, owner));
}

void construct_calibration(ValueScaleCalibration* self, const nb::kwargs& values) {
  Arguments call("ValueScaleCalibration", values);
  const int layers = call.small_integer("num_layers", 0);
  const int heads = call.small_integer("num_kv_heads", 0);
  const int head_size = call.small_integer("head_size", 0);
  call.done();
  new (self) ValueScaleCalibration(layers, heads, head_size);
}

void bind_value_scales(nb::module_& m) {
  m.def("save_value_scales", [](const nb::kwargs& values) {
    Arguments call("save_value_scales", values);
    const ValueScales scales = read_value_scales(call);
    const std::string path = call.text("path").value_or("");
    call.done();
    scales.save(path);
  });
  m.def("load_value_scales", [](const nb::kwargs& values) {
    Arguments call("load_value_scales", values);
    const std::string path = call.text("path").value_or("");
    call.done();
    return array_of(ValueScales::load(path));
  });
  nb::class_<ValueScaleCalibration>(m, "ValueScaleCalibration")
      .def("__init__", construct_calibration)
      // These two keep the GIL: the object is not thread-safe.
      .def("observe",
           [](ValueScaleCalibration& self, const nb::kwargs& values) {
             Arguments call("ValueScaleCalibration.observe", values);
             const int layer = call.small_integer("layer", -1);
             const ConstTensorView value = call.in("value");
             call.done();
             self.observe(layer, value);
           })
      .def("scales", [](const ValueScaleCalibration& self) { return array_of(self.scales()); });
}

}  // namespace

void bind_cache_memory(nb::module_& m) {
  bind_shapes(m);
  nb::class_<CacheMemory>(m, "CacheMemory")
      .def("__init__", construct_memory)
      .def_prop_ro("num_bytes", &CacheMemory::size)
      .def_prop_ro("report", report)
      .def("bytes", bytes_of)
      .def("huge_page_bytes", [](const CacheMemory& memory) {
        const nb::gil_scoped_release without_gil;
        return memory.huge_page_bytes();
      });
  bind_value_scales(m);
}

}  // namespace attend::python
