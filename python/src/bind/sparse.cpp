// SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/vector.h>

#include "arguments.h"
#include "attend/ops/sparse_index.h"
#include "attend/ops/sparse_mla.h"
#include "attend/oracle/sparse_index.h"
#include "attend/oracle/sparse_mla.h"
#include "oracle_result.h"

namespace attend::python {
namespace {

SparseMlaArgs read_sparse_mla(Arguments& call) {
  SparseMlaArgs a;
  a.q = call.in("q");
  a.kv_cache = call.in("kv_cache");
  a.indices = call.in("indices");
  a.topk_length = call.in("topk_length");
  a.out = call.out("out");
  a.lse = call.out("lse");
  a.max_logits = call.out("max_logits");
  a.kv_scale = call.in("kv_scale");
  a.sinks = call.in("sinks");
  a.scale = call.optional_number("scale");
  return a;
}

SparseIndexPages read_pages(Arguments& call) {
  SparseIndexPages p;
  p.block_table = call.in("block_table");
  p.num_blocks = call.integer("num_blocks", 0);
  p.block_size = call.small_integer("block_size", 0);
  p.block_stride_rows = call.integer("block_stride_rows", 0);
  return p;
}

ConvertReqIndexToGlobalIndexArgs read_convert(Arguments& call) {
  ConvertReqIndexToGlobalIndexArgs a;
  a.req_id = call.in("req_id");
  a.pages = read_pages(call);
  a.token_indices = call.in("token_indices");
  a.out = call.out("out");
  a.valid_counts = call.out("valid_counts");
  a.prefill_workspace_request_ids = call.in("prefill_workspace_request_ids");
  a.prefill_workspace_starts = call.in("prefill_workspace_starts");
  a.workspace_rows = call.integer("workspace_rows", 0);
  return a;
}

FilterAndConvertDcpIndexArgs read_filter(Arguments& call) {
  FilterAndConvertDcpIndexArgs a;
  a.req_id = call.in("req_id");
  a.pages = read_pages(call);
  a.token_indices = call.in("token_indices");
  a.out = call.out("out");
  a.valid_counts = call.out("valid_counts");
  a.world_size = call.small_integer("world_size", 1);
  a.interleave = call.small_integer("interleave", 1);
  a.rank = call.small_integer("rank", 0);
  a.compact_to_front = call.boolean("compact_to_front", false);
  return a;
}

/// (out, out_bound, lse, lse_bound, max_logits, max_logits_bound), each flat.
nb::tuple sparse_result(oracle::SparseMlaResult r) {
  return nb::make_tuple(numpy_array(std::move(r.out)), numpy_array(std::move(r.out_bound)),
                        numpy_array(std::move(r.lse)), numpy_array(std::move(r.lse_bound)),
                        numpy_array(std::move(r.max_logits)),
                        numpy_array(std::move(r.max_logits_bound)));
}

/// Row of one token of a request: the pages of one rank. @pre Sizes are in range.
std::int64_t oracle_index(std::int64_t token, const std::vector<std::int32_t>& blocks,
                          const nb::tuple& sizes) {
  const auto size = [&](std::size_t i) { return nb::cast<std::int64_t>(sizes[i]); };
  oracle::PagedTokens p;
  p.blocks = blocks;
  p.num_blocks = size(0);
  p.block_size = size(1);
  p.stride = size(2);
  p.world_size = size(3);
  p.interleave = size(4);
  p.rank = size(5);
  return oracle::global_index(token, p);
}

}  // namespace

void bind_sparse(nb::module_& m) {
  m.def("sparse_mla_attention", [](const nb::kwargs& values) {
    Arguments call("sparse_mla_attention", values);
    const SparseMlaArgs a = read_sparse_mla(call);
    const KernelOptions kernels = call.kernels();
    call.run([&](Executor& e) { sparse_mla_attention(a, &e, kernels); });
  });
  m.def("convert_req_index_to_global_index", [](const nb::kwargs& values) {
    Arguments call("convert_req_index_to_global_index", values);
    const ConvertReqIndexToGlobalIndexArgs a = read_convert(call);
    call.run([&](Executor& e) { convert_req_index_to_global_index(a, &e); });
  });
  m.def("filter_and_convert_dcp_index", [](const nb::kwargs& values) {
    Arguments call("filter_and_convert_dcp_index", values);
    const FilterAndConvertDcpIndexArgs a = read_filter(call);
    call.run([&](Executor& e) { filter_and_convert_dcp_index(a, &e); });
  });
  m.def("oracle_sparse_mla_attention", [](const nb::kwargs& values) {
    Arguments call("oracle.sparse_mla_attention", values);
    const SparseMlaArgs a = read_sparse_mla(call);
    SparseMlaArgs more;
    more.kv_cache = call.in("more_kv_cache");
    more.indices = call.in("more_indices");
    more.topk_length = call.in("more_topk_length");
    const SparseMlaArgs* also = more.kv_cache.defined() ? &more : nullptr;
    return sparse_result(call.run_here([&] { return oracle::sparse_mla_attention(a, also); }));
  });
  m.def("oracle_global_index", &oracle_index);
}

}  // namespace attend::python
