// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/differential.h"

#include "arguments.h"
#include "attend/cache/differential.h"
#include "attend/ops/differential_cache.h"
#include "attend/oracle/differential.h"
#include "attention_params.h"
#include "oracle_result.h"

namespace attend::python {
namespace {

DifferentialVariant read_variant(Arguments& call) {
  const std::string variant = call.text("variant").value_or("v1");
  if (variant == "v1") return DifferentialVariant::v1;
  if (variant == "v2") return DifferentialVariant::v2;
  call.refuse("variant", "v1 or v2", variant);
}

HeadPairing read_pairing(Arguments& call) {
  const std::string pairing = call.text("pairing").value_or("interleaved");
  if (pairing == "interleaved") return HeadPairing::interleaved;
  if (pairing == "halves") return HeadPairing::halves;
  call.refuse("pairing", "interleaved or halves", pairing);
}

DifferentialCombine read_combine(Arguments& call) {
  DifferentialCombine c;
  c.lambda = static_cast<float>(call.number("lambda", 0.0));
  c.token_lambda = call.in("token_lambda");
  c.norm = call.boolean("norm", true);
  c.norm_weight = call.in("norm_weight");
  c.norm_eps = static_cast<float>(call.number("norm_eps", 1e-5));
  c.out_scale = static_cast<float>(call.number("out_scale", 1.0));
  return c;
}

DifferentialAttentionArgs read_attention(Arguments& call) {
  DifferentialAttentionArgs a;
  a.q = call.in("q");
  a.k = call.in("k");
  a.v = call.in("v");
  a.out = call.out("out");
  a.maps = call.out("maps");
  a.lse = call.out("lse");
  a.query_start_loc = call.in("query_start_loc");
  a.cu_seqlens_kv = call.in("cu_seqlens_kv");
  a.seq_lens = call.in("seq_lens");
  a.block_table = call.in("block_table");
  a.q_descale = call.in("q_descale");
  a.k_descale = call.in("k_descale");
  a.v_descale = call.in("v_descale");
  a.variant = read_variant(call);
  a.pairing = read_pairing(call);
  a.combine = read_combine(call);
  a.params = read_attention_params(call);
  return a;
}

DifferentialCombineArgs read_combine_args(Arguments& call) {
  DifferentialCombineArgs a;
  a.maps = call.in("maps");
  a.out = call.out("out");
  a.variant = read_variant(call);
  a.pairing = read_pairing(call);
  a.combine = read_combine(call);
  return a;
}

DifferentialLambdaArgs read_lambda(Arguments& call) {
  DifferentialLambdaArgs a;
  a.lambda_q1 = call.in("lambda_q1");
  a.lambda_k1 = call.in("lambda_k1");
  a.lambda_q2 = call.in("lambda_q2");
  a.lambda_k2 = call.in("lambda_k2");
  if (!call.object("lambda_init").is_valid()) call.refuse("lambda_init", "a number", "None");
  a.lambda_init = call.number("lambda_init", 0.0);
  a.round_to = call.dtype("round_to");
  return a;
}

void bind_cache_functions(nb::module_& m) {
  m.def("differential_reshape_and_cache", [](const nb::kwargs& values) {
    Arguments call("differential_reshape_and_cache", values);
    DifferentialReshapeAndCacheArgs a;
    a.key = call.in("key");
    a.value = call.in("value");
    a.kv_cache = call.out("kv_cache");
    a.slot_mapping = call.in("slot_mapping");
    a.pairing = read_pairing(call);
    a.k_scale = call.in("k_scale");
    a.v_scale = call.in("v_scale");
    call.run([&](Executor& e) { differential_reshape_and_cache(a, &e); });
  });
  m.def("differential_cache_shape", [](const nb::kwargs& values) {
    Arguments call("differential_cache_shape", values);
    KvCacheSpec spec;
    spec.num_blocks = call.integer("num_blocks", 0);
    spec.block_size = call.small_integer("block_size", 0);
    spec.num_kv_heads = call.small_integer("num_kv_heads", 0);
    spec.head_size = call.small_integer("head_size", 0);
    spec.num_layers = call.small_integer("num_layers", 0);
    call.done();
    nb::list shape;
    for (const std::int64_t n : differential_cache_shape(spec)) shape.append(n);
    return nb::tuple(shape);
  });
  m.def("differential_stride_order", [](const nb::kwargs& values) {
    Arguments call("differential_stride_order", values);
    const std::string name = call.text("layout").value_or("NHD");
    const std::optional<KvLayout> layout = parse_kv_layout(name);
    if (!layout) call.refuse("layout", "NHD or HND", name);
    const bool include_layers = call.boolean("include_layers", false);
    call.done();
    nb::list order;
    for (const int dim : differential_stride_order(*layout, include_layers)) order.append(dim);
    return nb::tuple(order);
  });
}

void bind_oracle(nb::module_& m) {
  m.def("oracle_differential_attention", [](const nb::kwargs& values) {
    Arguments call("oracle.differential_attention", values);
    const DifferentialAttentionArgs a = read_attention(call);
    return oracle_result(call.run_here([&] { return oracle::differential_attention(a); }));
  });
  m.def("oracle_differential_combine", [](const nb::kwargs& values) {
    Arguments call("oracle.differential_combine", values);
    const DifferentialCombineArgs a = read_combine_args(call);
    return oracle_result(call.run_here([&] { return oracle::differential_combine(a); }));
  });
  m.def("oracle_differential_lambda", [](const nb::kwargs& values) {
    Arguments call("oracle.differential_lambda", values);
    const DifferentialLambdaArgs a = read_lambda(call);
    const oracle::Number n = call.run_here([&] { return oracle::differential_lambda(a); });
    return nb::make_tuple(n.value, n.bound);
  });
}

}  // namespace

void bind_differential(nb::module_& m) {
  m.def("differential_attention", [](const nb::kwargs& values) {
    Arguments call("differential_attention", values);
    const DifferentialAttentionArgs a = read_attention(call);
    const KernelOptions kernels = call.kernels();
    call.run([&](Executor& e) { differential_attention(a, &e, kernels); });
  });
  m.def("differential_combine", [](const nb::kwargs& values) {
    Arguments call("differential_combine", values);
    const DifferentialCombineArgs a = read_combine_args(call);
    const KernelOptions kernels(call.isa());
    call.run([&](Executor& e) { differential_combine(a, &e, kernels); });
  });
  m.def("differential_lambda", [](const nb::kwargs& values) {
    Arguments call("differential_lambda", values);
    const DifferentialLambdaArgs a = read_lambda(call);
    return call.run_here([&] { return differential_lambda(a); });
  });
  m.def("differential_lambda_init", [](const nb::kwargs& values) {
    Arguments call("differential_lambda_init", values);
    const int layer = call.small_integer("layer", -1);
    return call.run_here([&] { return differential_lambda_init(layer); });
  });
  bind_cache_functions(m);
  bind_oracle(m);
}

}  // namespace attend::python
