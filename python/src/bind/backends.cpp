// SPDX-License-Identifier: Apache-2.0
#include "attend/backend/backend.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "attend/backend/selector.h"
#include "configs.h"

namespace attend::python {
namespace {

template <typename T>
nb::tuple words(const std::vector<T>& values) {
  nb::list list;
  for (const T& value : values) list.append(nb::str(std::string(to_string(value)).c_str()));
  return nb::tuple(list);
}

template <typename T>
nb::tuple tuple_of(const std::vector<T>& values) {
  return nb::tuple(nb::cast(values));
}

nb::dict capability_of(const Backend& backend) {
  const Capability& c = backend.capability();
  nb::dict d;
  d["dtypes"] = words(c.dtypes);
  d["cpu_only_dtypes"] = words(c.cpu_only_dtypes);
  d["kv_cache_dtypes"] = tuple_of(c.kv_cache_dtypes);
  d["head_size_multiple"] = c.head_size_multiple;
  d["max_head_size"] = c.max_head_size;
  d["head_sizes"] = tuple_of(c.head_sizes);
  d["block_sizes"] = tuple_of(c.block_sizes);
  d["attn_types"] = words(c.attn_types);
  d["devices"] = words(c.devices);
  d["min_cuda_capability"] = c.min_cuda_capability;
  d["is_mla"] = c.is_mla;
  d["is_sparse"] = c.is_sparse;
  d["is_differential"] = c.is_differential;
  d["supports_sink"] = c.supports_sink;
  d["supports_mm_prefix"] = c.supports_mm_prefix;
  d["supports_per_head_quant_scales"] = c.supports_per_head_quant_scales;
  d["supports_non_causal"] = c.supports_non_causal;
  d["supports_alibi_sqrt"] = c.supports_alibi_sqrt;
  d["supports_batch_invariance"] = c.supports_batch_invariance;
  d["supports_kv_connector"] = c.supports_kv_connector;
  return d;
}

nb::dict capability_of(const MlaPrefillBackend& backend) {
  const MlaPrefillCapability& c = backend.capability();
  nb::dict d;
  d["dtypes"] = words(c.dtypes);
  d["cpu_only_dtypes"] = words(c.cpu_only_dtypes);
  d["devices"] = words(c.devices);
  d["min_cuda_capability"] = c.min_cuda_capability;
  d["rocm_archs"] = tuple_of(c.rocm_archs);
  d["dim_multiple"] = c.dim_multiple;
  d["max_head_dim"] = c.max_head_dim;
  d["quant_output_devices"] = words(c.quant_output_devices);
  d["supports_batch_invariance"] = c.supports_batch_invariance;
  return d;
}

/// (name or None, [(name, reasons)], [name])
template <typename Selection>
nb::tuple selection_of(const Selection& s) {
  const nb::object name = s.backend == nullptr ? nb::none() : nb::cast(s.backend->name());
  return nb::make_tuple(name, s.rejected, s.also_valid);
}

void bind_shapes(nb::class_<Backend>& type) {
  type.def("kv_cache_shape", [](const Backend& b, const nb::kwargs& values) {
    Arguments call("kv_cache_shape", values);
    const KvCacheSpec spec = read_fields(call, "spec", read_cache_spec);
    call.done();
    return tuple_of(b.kv_cache_shape(spec));
  });
  type.def("kv_scale_shape", [](const Backend& b, const nb::kwargs& values) {
    Arguments call("kv_scale_shape", values);
    const KvCacheSpec spec = read_fields(call, "spec", read_cache_spec);
    call.done();
    return tuple_of(b.kv_scale_shape(spec));
  });
  type.def("kv_cache_stride_order", [](const Backend& b, const nb::kwargs& values) {
    Arguments call("kv_cache_stride_order", values);
    const KvLayout layout = read_layout(call, "layout");
    const bool layers = call.boolean("include_layers", false);
    const KvFormat format = read_format(call, "format");
    call.done();
    return tuple_of(b.kv_cache_stride_order(layout, layers, format));
  });
  type.def_prop_ro("kv_cache_block_dim", &Backend::kv_cache_block_dim);
  type.def_prop_ro("required_kv_cache_layout", [](const Backend& b) -> std::optional<std::string> {
    const std::optional<KvLayout> layout = b.required_kv_cache_layout();
    if (!layout) return std::nullopt;
    return *layout == KvLayout::nhd ? "nhd" : "hnd";
  });
  type.def("preferred_block_size", [](const Backend& b, const nb::kwargs& values) {
    Arguments call("preferred_block_size", values);
    const int preferred = call.small_integer("preferred", 16);
    call.done();
    return b.preferred_block_size(preferred);
  });
}

void bind_selection(nb::module_& m) {
  m.def("backend_names", [] {
    nb::list names;
    for (const Backend* b : backends()) names.append(b->name());
    return names;
  });
  m.def(
      "find_backend",
      [](const nb::kwargs& values) -> const Backend& {
        Arguments call("find_backend", values);
        const std::string name = call.text("name").value_or("");
        call.done();
        return find_backend(name);
      },
      nb::rv_policy::reference);
  m.def("select_backend", [](const nb::kwargs& values) {
    Arguments call("select_backend", values);
    const AttentionConfig config = read_fields(call, "config", read_attention_config);
    const std::optional<std::string> name = call.text("name");
    call.done();
    return selection_of(name ? select_backend(config, *name) : select_backend(config));
  });
  m.def(
      "require_backend",
      [](const nb::kwargs& values) -> const Backend& {
        Arguments call("require_backend", values);
        const AttentionConfig config = read_fields(call, "config", read_attention_config);
        const std::string name = call.text("name").value_or("auto");
        call.done();
        return require_backend(config, name);
      },
      nb::rv_policy::reference);
  m.def("backend_priority", [](const nb::kwargs& values) {
    Arguments call("backend_priority", values);
    const AttentionConfig config = read_fields(call, "config", read_attention_config);
    call.done();
    nb::list names;
    for (const Backend* b : backend_priority(config)) names.append(b->name());
    return names;
  });
}

void bind_mla_prefill(nb::module_& m) {
  m.def("mla_prefill_backends", [] {
    nb::dict all;
    for (const MlaPrefillBackend* b : mla_prefill_backends())
      all[nb::cast(b->name())] = capability_of(*b);
    return all;
  });
  m.def("select_mla_prefill", [](const nb::kwargs& values) {
    Arguments call("select_mla_prefill", values);
    const MlaPrefillConfig config = read_fields(call, "config", read_mla_prefill_config);
    const std::optional<std::string> name = call.text("name");
    call.done();
    return selection_of(name ? select_mla_prefill(config, *name) : select_mla_prefill(config));
  });
}

}  // namespace

void bind_backends(nb::module_& m) {
  nb::class_<Backend> type(m, "Backend");
  type.def_prop_ro("name", &Backend::name);
  type.def_prop_ro("capability", [](const Backend& b) { return capability_of(b); });
  type.def("validate_configuration", [](const Backend& b, const nb::kwargs& values) {
    Arguments call("validate_configuration", values);
    const AttentionConfig config = read_fields(call, "config", read_attention_config);
    call.done();
    return b.validate_configuration(config);
  });
  bind_shapes(type);
  bind_selection(m);
  bind_mla_prefill(m);
}

}  // namespace attend::python
