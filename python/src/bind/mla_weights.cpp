// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/mla_weights.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string_view.h>

#include "arguments.h"
#include "attend/oracle/projection.h"
#include "oracle_result.h"

namespace attend::python {
namespace {

KvBProjArgs read_kv_b_proj(Arguments& call) {
  KvBProjArgs a;
  a.weight = call.in("weight");
  a.weight_scale = call.in("weight_scale");
  a.dims.kv_lora_rank = call.small_integer("kv_lora_rank", 0);
  a.dims.qk_nope_head_dim = call.small_integer("qk_nope_head_dim", 0);
  a.dims.qk_rope_head_dim = call.small_integer("qk_rope_head_dim", 0);
  a.dims.v_head_dim = call.small_integer("v_head_dim", 0);
  a.num_heads = call.small_integer("num_heads", 0);
  a.dtype = call.dtype("dtype").value_or(a.weight.dtype);
  a.isa = call.isa();
  return a;
}

/// Result of the oracle of a product: (out, bound).
nb::tuple projection(oracle::Projection p) {
  return nb::make_tuple(numpy_array(std::move(p.out)), numpy_array(std::move(p.bound)));
}

/// `product` names the method whose reference is wanted; up_project_keys and up_project_values are
/// the halves of up_project.
nb::tuple oracle_product(const nb::kwargs& values) {
  Arguments call("oracle.MlaWeights", values);
  const KvBProjArgs a = read_kv_b_proj(call);
  const ConstTensorView input = call.in("input");
  const std::string product = call.text("product").value_or("");
  return projection(call.run_here([&] {
    const oracle::KvBProj w = oracle::kv_b_proj(a);
    if (product == "up_project_keys") return oracle::up_project_keys(w, input);
    if (product == "up_project_values") return oracle::up_project_values(w, input);
    if (product == "absorb_query") return oracle::absorb_query(w, input);
    return oracle::v_up_project(w, input);
  }));
}

void bind_products(nb::class_<MlaWeights>& weights) {
  weights.def("up_project", [](const MlaWeights& w, const nb::kwargs& values) {
    Arguments call("MlaWeights.up_project", values);
    const ConstTensorView kv_c = call.in("kv_c");
    const TensorView k_nope = call.out("k_nope"), v = call.out("v");
    call.run([&](Executor& e) { w.up_project(kv_c, k_nope, v, &e); });
  });
  weights.def("absorb_query", [](const MlaWeights& w, const nb::kwargs& values) {
    Arguments call("MlaWeights.absorb_query", values);
    const ConstTensorView q_nope = call.in("q_nope");
    const TensorView out = call.out("ql_nope");
    call.run([&](Executor& e) { w.absorb_query(q_nope, out, &e); });
  });
  weights.def("v_up_project", [](const MlaWeights& w, const nb::kwargs& values) {
    Arguments call("MlaWeights.v_up_project", values);
    const ConstTensorView latents = call.in("latents");
    const TensorView out = call.out("out");
    call.run([&](Executor& e) { w.v_up_project(latents, out, &e); });
  });
  weights.def("copy_w_uk_t", [](const MlaWeights& w, const nb::kwargs& values) {
    Arguments call("MlaWeights.copy_w_uk_t", values);
    const TensorView out = call.out("out");
    call.run_here([&] { w.copy_w_uk_t(out); });
  });
  weights.def("copy_w_uv", [](const MlaWeights& w, const nb::kwargs& values) {
    Arguments call("MlaWeights.copy_w_uv", values);
    const TensorView out = call.out("out");
    call.run_here([&] { w.copy_w_uv(out); });
  });
}

}  // namespace

void bind_mla_weights(nb::module_& m) {
  nb::class_<MlaWeights> weights(m, "MlaWeights");
  bind_products(weights);
  weights.def_static("from_kv_b_proj", [](const nb::kwargs& values) {
    Arguments call("MlaWeights.from_kv_b_proj", values);
    KvBProjArgs a = read_kv_b_proj(call);
    return call.run([&](Executor& e) {
      a.executor = &e;
      return MlaWeights::from_kv_b_proj(a);
    });
  });
  weights.def_prop_ro("dims", [](const MlaWeights& w) {
    const MlaDims& d = w.dims();
    return nb::make_tuple(d.kv_lora_rank, d.qk_nope_head_dim, d.qk_rope_head_dim, d.v_head_dim);
  });
  weights.def_prop_ro("num_heads", &MlaWeights::num_heads);
  weights.def_prop_ro("dtype", [](const MlaWeights& w) { return to_string(w.dtype()); });
  weights.def_prop_ro("isa", [](const MlaWeights& w) { return to_string(w.isa()); });
  weights.def_prop_ro("bytes", &MlaWeights::bytes);
  m.def("oracle_mla_product", &oracle_product);
}

}  // namespace attend::python
