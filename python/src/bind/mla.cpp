// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/mla.h"

#include "arguments.h"
#include "attend/cache/row_format.h"
#include "attend/ops/mla_cache.h"
#include "attend/oracle/mla_decode.h"
#include "attend/oracle/quantize.h"
#include "attention_params.h"
#include "block_moves.h"
#include "oracle_result.h"

namespace attend::python {
namespace {

MlaDecodeArgs read_decode(Arguments& call) {
  MlaDecodeArgs a;
  a.q = call.in("q");
  a.kv_cache = call.in("kv_cache");
  a.block_table = call.in("block_table");
  a.query_start_loc = call.in("query_start_loc");
  a.seq_lens = call.in("seq_lens");
  a.out = call.out("out");
  a.lse = call.out("lse");
  a.kv_scale = call.in("kv_scale");
  a.params = read_attention_params(call);
  return a;
}

ConcatAndCacheMlaArgs read_concat(Arguments& call) {
  ConcatAndCacheMlaArgs a;
  a.kv_c = call.in("kv_c");
  a.k_pe = call.in("k_pe");
  a.kv_cache = call.out("kv_cache");
  a.slot_mapping = call.in("slot_mapping");
  a.scale = call.in("scale");
  return a;
}

ConcatAndCacheMlaRopeFusedArgs read_concat_rope(Arguments& call) {
  ConcatAndCacheMlaRopeFusedArgs a;
  a.positions = call.in("positions");
  a.q_pe = call.out("q_pe");
  a.k_pe = call.out("k_pe");
  a.kv_c = call.in("kv_c");
  a.cos_sin_cache = call.in("cos_sin_cache");
  if (!call.object("is_neox").is_valid()) call.refuse("is_neox", "True or False", "None");
  a.is_neox = call.boolean("is_neox", false);
  a.slot_mapping = call.in("slot_mapping");
  a.kv_cache = call.out("kv_cache");
  a.scale = call.in("scale");
  return a;
}

GatherAndMaybeDequantCacheArgs read_gather(Arguments& call) {
  GatherAndMaybeDequantCacheArgs a;
  a.src_cache = call.in("src_cache");
  a.dst = call.out("dst");
  a.block_table = call.in("block_table");
  a.cu_seq_lens = call.in("cu_seq_lens");
  a.seq_starts = call.in("seq_starts");
  a.scale = call.in("scale");
  return a;
}

CpGatherCacheArgs read_cp_gather(Arguments& call) {
  CpGatherCacheArgs a;
  a.src_cache = call.in("src_cache");
  a.dst = call.out("dst");
  a.block_table = call.in("block_table");
  a.cu_seq_lens = call.in("cu_seq_lens");
  a.seq_starts = call.in("seq_starts");
  return a;
}

CpGatherAndUpconvertFp8KvCacheArgs read_upconvert(Arguments& call) {
  CpGatherAndUpconvertFp8KvCacheArgs a;
  a.src_cache = call.in("src_cache");
  a.dst = call.out("dst");
  a.block_table = call.in("block_table");
  a.workspace_starts = call.in("workspace_starts");
  return a;
}

/// Rows of a cache of bytes as numbers, [num_blocks * block_size, elements], flat.
std::vector<double> oracle_rows(Arguments& call) {
  const ConstTensorView cache = call.in("kv_cache");
  const bool bytes = cache.defined() && cache.rank == 3 && cache.dtype == DType::u8;
  if (!bytes || find_row_format(cache.shape[2]) == nullptr)
    call.refuse("kv_cache",
                "uint8 [num_blocks, block_size, bytes], rows of " + describe_row_formats(),
                cache.defined() ? describe(cache) : "None");
  return call.run_here([&] {
    std::vector<double> elements;
    for (std::int64_t block = 0; block < cache.shape[0]; ++block) {
      for (std::int64_t offset = 0; offset < cache.shape[1]; ++offset) {
        const std::vector<double> row = oracle::coded_row(cache, block, offset);
        elements.insert(elements.end(), row.begin(), row.end());
      }
    }
    return elements;
  });
}

void bind_caches(nb::module_& m) {
  m.def("concat_and_cache_mla", [](const nb::kwargs& values) {
    Arguments call("concat_and_cache_mla", values);
    const ConcatAndCacheMlaArgs a = read_concat(call);
    call.run([&](Executor& e) { concat_and_cache_mla(a, &e); });
  });
  m.def("concat_and_cache_mla_rope_fused", [](const nb::kwargs& values) {
    Arguments call("concat_and_cache_mla_rope_fused", values);
    const ConcatAndCacheMlaRopeFusedArgs a = read_concat_rope(call);
    call.run([&](Executor& e) { concat_and_cache_mla_rope_fused(a, &e); });
  });
  m.def("gather_and_maybe_dequant_cache", [](const nb::kwargs& values) {
    Arguments call("gather_and_maybe_dequant_cache", values);
    const GatherAndMaybeDequantCacheArgs a = read_gather(call);
    call.run([&](Executor& e) { gather_and_maybe_dequant_cache(a, &e); });
  });
  m.def("cp_gather_cache", [](const nb::kwargs& values) {
    Arguments call("cp_gather_cache", values);
    const CpGatherCacheArgs a = read_cp_gather(call);
    call.run([&](Executor& e) { cp_gather_cache(a, &e); });
  });
  m.def("cp_gather_and_upconvert_fp8_kv_cache", [](const nb::kwargs& values) {
    Arguments call("cp_gather_and_upconvert_fp8_kv_cache", values);
    const CpGatherAndUpconvertFp8KvCacheArgs a = read_upconvert(call);
    call.run([&](Executor& e) { cp_gather_and_upconvert_fp8_kv_cache(a, &e); });
  });
  m.def("copy_blocks_mla", [](const nb::kwargs& values) {
    Arguments call("copy_blocks_mla", values);
    const std::vector<TensorView> caches = call.out_list("caches");
    const std::vector<BlockMove> moves = read_block_moves(call);
    call.run_here([&] { copy_blocks_mla(caches, moves); });
  });
}

/// (name, latent, rope, tile, value_dim, power_of_two_scales, scales_apart, row_bytes) of each.
nb::list row_format_list() {
  nb::list all;
  for (const RowFormat* f : row_formats())
    all.append(nb::make_tuple(nb::str(f->name.data(), f->name.size()), f->latent, f->rope, f->tile,
                              f->value_dim, f->scale == RowScale::ue8m0, f->scales_apart,
                              f->row_bytes));
  return all;
}

}  // namespace

void bind_mla(nb::module_& m) {
  m.def("mla_decode", [](const nb::kwargs& values) {
    Arguments call("mla_decode", values);
    const MlaDecodeArgs a = read_decode(call);
    const KernelOptions kernels = call.kernels();
    call.run([&](Executor& e) { mla_decode(a, &e, kernels); });
  });
  m.def("oracle_mla_decode", [](const nb::kwargs& values) {
    Arguments call("oracle.mla_decode", values);
    const MlaDecodeArgs a = read_decode(call);
    return oracle_result(call.run_here([&] { return oracle::mla_decode(a); }));
  });
  bind_caches(m);
  m.def("row_formats", &row_format_list);
  m.def("oracle_mla_rows", [](const nb::kwargs& values) {
    Arguments call("oracle.mla_rows", values);
    return numpy_array(oracle_rows(call));
  });
}

}  // namespace attend::python
