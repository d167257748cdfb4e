// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "attend/backend/backend.h"
#include "batch.h"
#include "configs.h"
#include "run_with_metadata.h"

/// Builders, what they build, and layers.
namespace attend::python {
namespace {

constexpr int kMostWorkers = 4096;
constexpr const char* kBatch = "an attend.batch.CommonMetadata";

struct Builder {
  std::unique_ptr<MetadataBuilder> builder;
  int num_workers = 1;  ///< that layers must run on
};

struct Layer {
  std::unique_ptr<Impl> impl;
  bool is_mla = false, is_sparse = false, is_differential = false;  ///< its back end
};

Built made(nb::handle builder, nb::object owner, std::unique_ptr<Metadata> metadata) {
  Built b;
  b.builder = nb::borrow(builder);
  b.num_workers = nb::cast<const Builder&>(builder).num_workers;
  b.block_table_owner = std::move(owner);
  b.running = std::make_shared<std::atomic<int>>(0);
  b.metadata = std::move(metadata);
  return b;
}

// Builders are not thread-safe, and quick: these keep the GIL.

Built build(nb::handle self, const nb::kwargs& values) {
  Arguments call("MetadataBuilder.build", values);
  const auto& batch = object_of<Batch>(call, "batch", kBatch);
  const int prefix = call.small_integer("common_prefix_len", 0);
  const bool fast = call.boolean("fast_build", false);
  call.done();
  auto metadata = nb::cast<Builder&>(self).builder->build(prefix, batch.common, fast);
  return made(self, nb::find(batch), std::move(metadata));
}

Built build_for_capture(nb::handle self, const nb::kwargs& values) {
  Arguments call("MetadataBuilder.build_for_capture", values);
  const auto& batch = object_of<Batch>(call, "batch", kBatch);
  call.done();
  auto metadata = nb::cast<Builder&>(self).builder->build_for_capture(batch.common);
  return made(self, nb::find(batch), std::move(metadata));
}

Built update_block_table(nb::handle self, const nb::kwargs& values) {
  Arguments call("MetadataBuilder.update_block_table", values);
  const auto& source = object_of<Built>(call, "metadata", kMetadata);
  const nb::handle tensor = call.object("block_table");
  const std::vector<std::int64_t> slots = read_i64(call, "slot_mapping");
  call.done();
  Imports imports;
  ConstTensorView table;
  if (tensor.is_valid())
    table = view_of(tensor, framework_of(tensor), {call.function(), "block_table"}, false, imports);
  auto metadata =
      nb::cast<Builder&>(self).builder->update_block_table(*source.metadata, table, slots);
  Built b = made(self, tensor.is_valid() ? nb::borrow(tensor) : nb::none(), std::move(metadata));
  b.imports = std::move(imports);
  b.num_workers = source.num_workers;
  b.running = source.running;
  return b;
}

void refresh(const Builder& self, const nb::kwargs& values) {
  Arguments call("MetadataBuilder.refresh", values);
  auto& built = object_of<Built>(call, "metadata", kMetadata);
  const auto& batch = object_of<Batch>(call, "batch", kBatch);
  call.done();
  if (*built.running != 0)
    call.refuse("metadata", "metadata that no layer is running with",
                fmt::format("{} running", built.running->load()));
  self.builder->refresh(*built.metadata, batch.common);
  built.block_table_owner = nb::find(batch);
  built.imports.clear();
}

std::string_view to_string(GraphSupport support) noexcept {
  switch (support) {
    case GraphSupport::uniform_single_token_decode:
      return "uniform_single_token_decode";
    case GraphSupport::uniform_batch:
      return "uniform_batch";
    case GraphSupport::always:
      return "always";
    case GraphSupport::never:
      break;
  }
  return "never";
}

void bind_builder(nb::module_& m) {
  nb::class_<Builder>(m, "MetadataBuilder")
      .def("build", build)
      .def("build_for_capture", build_for_capture)
      .def("update_block_table", update_block_table)
      .def("refresh", refresh)
      .def_prop_ro("reorder_batch_threshold",
                   [](const Builder& b) { return b.builder->reorder_batch_threshold(); })
      .def_prop_ro("graph_support",
                   [](const Builder& b) { return to_string(b.builder->graph_support()); });
  nb::class_<Built>(m, "Metadata")
      .def_prop_ro("workspace_bytes", [](const Built& b) { return b.metadata->workspace_bytes(); })
      .def_prop_ro("cascade",
                   [](const Built& b) -> std::optional<std::string> {
                     const CascadeDecision* decision = b.metadata->cascade_decision();
                     if (decision == nullptr) return std::nullopt;
                     return describe(*decision);
                   })
      .def_prop_ro("sparse", [](const Built& b) -> std::optional<std::string> {
        const SparseBatch* batch = b.metadata->sparse_batch();
        if (batch == nullptr) return std::nullopt;
        return describe(batch->decision);
      });
  m.def("make_builder", [](const nb::kwargs& values) {
    Arguments call("make_builder", values);
    const auto& backend = object_of<const Backend>(call, "backend", "an attend.backends.Backend");
    const BuilderConfig config = read_fields(call, "config", read_builder_config);
    call.done();
    if (config.num_workers > kMostWorkers)
      call.refuse("num_workers", fmt::format("at most {} threads", kMostWorkers),
                  fmt::format("{}", config.num_workers));
    return Builder{backend.make_builder(config), config.num_workers};
  });
}

ForwardArgs read_forward(Arguments& call) {
  ForwardArgs a;
  a.query = call.in("query");
  a.key = call.in("key");
  a.value = call.in("value");
  a.kv_c = call.in("kv_c");
  a.k_pe = call.in("k_pe");
  a.topk_indices = call.in("topk_indices");
  a.token_lambda = call.in("token_lambda");
  a.kv_cache = call.out("kv_cache");
  a.kv_scale_cache = call.out("kv_scale_cache");
  a.output = call.out("output");
  a.output_scale = call.optional_number("output_scale");
  a.lse = call.out("lse");
  return a;
}

/// Tensors of other kinds of layers are errors, which the C++ impls do not look at.
void refuse_unused(const Arguments& call, const Layer& layer, const ForwardArgs& a) {
  const auto refuse = [&](bool unused, const char* name, const char* kind) {
    if (unused) call.refuse(name, fmt::format("None: it is for {}", kind), "a value");
  };
  refuse(!layer.is_mla && a.kv_c.defined(), "kv_c", "MLA layers");
  refuse(!layer.is_mla && a.k_pe.defined(), "k_pe", "MLA layers");
  refuse(!layer.is_mla && a.output_scale.has_value(), "output_scale", "MLA layers");
  refuse(layer.is_mla && a.key.defined(), "key", "layers without MLA");
  refuse(layer.is_mla && a.value.defined(), "value", "layers without MLA");
  refuse(layer.is_mla && a.kv_scale_cache.defined(), "kv_scale_cache", "layers without MLA");
  refuse(!layer.is_sparse && a.topk_indices.defined(), "topk_indices", "sparse MLA layers");
  refuse(!layer.is_differential && a.token_lambda.defined(), "token_lambda",
         "layers with differential attention");
}

void forward(const Layer& layer, const nb::kwargs& values) {
  Arguments call("Impl.forward", values);
  ForwardArgs a = read_forward(call);
  refuse_unused(call, layer, a);
  const auto bytes = [](const Metadata& m) { return m.workspace_bytes(); };
  run_with_metadata(call, bytes, [&](const Metadata* m, Executor& e, Workspace workspace) {
    a.executor = &e;
    a.workspace = workspace;
    layer.impl->forward(a, m);
  });
}

}  // namespace

void bind_backend_layers(nb::module_& m) {
  bind_builder(m);
  nb::class_<Layer>(m, "Impl").def("forward", forward);
  m.def("make_impl", [](const nb::kwargs& values) {
    Arguments call("make_impl", values);
    const auto& backend = object_of<const Backend>(call, "backend", "an attend.backends.Backend");
    const ImplConfig config = read_fields(call, "config", read_impl_config);
    call.done();
    const Capability& c = backend.capability();
    return Layer{backend.make_impl(config), c.is_mla, c.is_sparse, c.is_differential};
  });
}

}  // namespace attend::python
