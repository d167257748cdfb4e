// SPDX-License-Identifier: Apache-2.0
#include "attend/backend/sparse_indexer.h"

#include "batch.h"
#include "run_with_metadata.h"

namespace attend::python {
namespace {

/// An indexer and the tensor that it points to.
struct Indexer {
  nb::object cos_sin_cache;
  Imports imports;
  SparseIndexer indexer;
};

IndexerScale read_scale_format(Arguments& call) {
  const std::string word = call.text("scale_fmt").value_or("ue8m0");
  if (word == "ue8m0") return IndexerScale::ue8m0;
  if (word != "unrounded") call.refuse("scale_fmt", "ue8m0 or unrounded", word);
  return IndexerScale::unrounded;
}

void construct(Indexer* self, const nb::kwargs& values) {
  Arguments call("SparseIndexer", values);
  SparseIndexerConfig c;
  Imports imports;
  c.num_heads = call.small_integer("num_heads", c.num_heads);
  c.topk = call.small_integer("topk", c.topk);
  const nb::handle rotation = call.object("cos_sin_cache");
  if (rotation.is_valid())
    c.cos_sin_cache = view_of(rotation, framework_of(rotation), {call.function(), "cos_sin_cache"},
                              false, imports);
  c.is_neox = call.boolean("is_neox", c.is_neox);
  c.k_norm_weight = call.numbers("k_norm_weight");
  c.k_norm_bias = call.numbers("k_norm_bias");
  c.k_norm_eps = static_cast<float>(call.number("k_norm_eps", static_cast<double>(c.k_norm_eps)));
  c.hadamard = call.boolean("hadamard", c.hadamard);
  c.scale_fmt = read_scale_format(call);
  c.softmax_scale = call.optional_number("softmax_scale");
  call.done();
  const nb::object owner = rotation.is_valid() ? nb::borrow(rotation) : nb::none();
  new (self) Indexer{owner, std::move(imports), SparseIndexer(std::move(c))};
}

void forward(const Indexer& self, const nb::kwargs& values) {
  Arguments call("SparseIndexer.forward", values);
  SparseIndexerArgs a;
  a.q = call.in("q");
  a.k = call.in("k");
  a.weights = call.in("weights");
  a.positions = call.in("positions");
  a.cache = call.out("cache");
  a.topk_indices = call.out("topk_indices");
  const auto bytes = [&](const Metadata& m) { return self.indexer.workspace_bytes(m); };
  run_with_metadata(call, bytes, [&](const Metadata* m, Executor& e, Workspace workspace) {
    a.executor = &e;
    a.workspace = workspace;
    self.indexer.forward(a, m);
  });
}

}  // namespace

void bind_sparse_indexer(nb::module_& m) {
  nb::class_<Indexer>(m, "SparseIndexer")
      .def("__init__", construct)
      .def("workspace_bytes",
           [](const Indexer& self, const nb::kwargs& values) {
             Arguments call("SparseIndexer.workspace_bytes", values);
             const auto& built = object_of<Built>(call, "metadata", kMetadata);
             call.done();
             return self.indexer.workspace_bytes(*built.metadata);
           })
      .def("forward", forward);
}

}  // namespace attend::python
