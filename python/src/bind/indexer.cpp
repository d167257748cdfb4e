// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/indexer.h"

#include <array>

#include "arguments.h"
#include "attend/ops/indexer_cache.h"
#include "attend/ops/indexer_logits.h"
#include "attend/oracle/indexer.h"
#include "attend/oracle/quantize.h"
#include "oracle_result.h"

namespace attend::python {
namespace {

IndexerScale read_scale_format(Arguments& call, const char* name, IndexerScale otherwise) {
  const std::optional<std::string> word = call.text(name);
  if (!word) return otherwise;
  if (*word == "unrounded") return IndexerScale::unrounded;
  if (*word != "ue8m0") call.refuse(name, "unrounded or ue8m0", *word);
  return IndexerScale::ue8m0;
}

PrepareIndexerArgs read_prepare(Arguments& call) {
  PrepareIndexerArgs a;
  a.q = call.in("q");
  a.k = call.in("k");
  a.weights = call.in("weights");
  a.positions = call.in("positions");
  a.cos_sin_cache = call.in("cos_sin_cache");
  a.is_neox = call.boolean("is_neox", true);
  a.k_norm_weight = call.in("k_norm_weight");
  a.k_norm_bias = call.in("k_norm_bias");
  a.k_norm_eps = static_cast<float>(call.number("k_norm_eps", 1e-6));
  a.hadamard = call.boolean("hadamard", false);
  a.q_scale_fmt = read_scale_format(call, "q_scale_fmt", IndexerScale::ue8m0);
  a.softmax_scale = call.optional_number("softmax_scale");
  a.q_codes = call.out("q_codes");
  a.weights_out = call.out("weights_out");
  a.k_out = call.out("k_out");
  return a;
}

Fp8MqaLogitsArgs read_mqa(Arguments& call) {
  Fp8MqaLogitsArgs a;
  a.q = call.in("q");
  a.k = call.in("k");
  a.k_scale = call.in("k_scale");
  a.weights = call.in("weights");
  a.ks = call.in("ks");
  a.ke = call.in("ke");
  a.logits = call.out("logits");
  a.clean_logits = call.boolean("clean_logits", true);
  return a;
}

Fp8PagedMqaLogitsArgs read_paged_mqa(Arguments& call) {
  Fp8PagedMqaLogitsArgs a;
  a.q = call.in("q");
  a.kv_cache = call.in("kv_cache");
  a.weights = call.in("weights");
  a.context_lens = call.in("context_lens");
  a.block_table = call.in("block_table");
  a.schedule_metadata = call.in("schedule_metadata");
  a.logits = call.out("logits");
  a.clean_logits = call.boolean("clean_logits", true);
  return a;
}

void bind_steps(nb::module_& m) {
  m.def("prepare_indexer", [](const nb::kwargs& values) {
    Arguments call("prepare_indexer", values);
    const PrepareIndexerArgs a = read_prepare(call);
    call.run([&](Executor& e) { prepare_indexer(a, &e); });
  });
  m.def("indexer_short_rows", [](const nb::kwargs& values) {
    Arguments call("indexer_short_rows", values);
    IndexerShortRowsArgs a;
    a.lengths = call.in("lengths");
    a.out = call.out("out");
    return call.run([&](Executor& e) { return indexer_short_rows(a, &e); });
  });
  m.def("indexer_k_quant_and_cache", [](const nb::kwargs& values) {
    Arguments call("indexer_k_quant_and_cache", values);
    IndexerKQuantAndCacheArgs a;
    a.k = call.in("k");
    a.kv_cache = call.out("kv_cache");
    a.slot_mapping = call.in("slot_mapping");
    a.scale_fmt = read_scale_format(call, "scale_fmt", IndexerScale::unrounded);
    call.run([&](Executor& e) { indexer_k_quant_and_cache(a, &e); });
  });
  m.def("cp_gather_indexer_k_quant_cache", [](const nb::kwargs& values) {
    Arguments call("cp_gather_indexer_k_quant_cache", values);
    CpGatherIndexerKQuantCacheArgs a;
    a.kv_cache = call.in("kv_cache");
    a.dst_k = call.out("dst_k");
    a.dst_scale = call.out("dst_scale");
    a.block_table = call.in("block_table");
    a.cu_seq_lens = call.in("cu_seq_lens");
    call.run([&](Executor& e) { cp_gather_indexer_k_quant_cache(a, &e); });
  });
}

void bind_logits(nb::module_& m) {
  m.def("fp8_mqa_logits", [](const nb::kwargs& values) {
    Arguments call("fp8_mqa_logits", values);
    const Fp8MqaLogitsArgs a = read_mqa(call);
    const std::optional<IsaLevel> isa = call.isa();
    call.run([&](Executor& e) { fp8_mqa_logits(a, &e, isa); });
  });
  m.def("fp8_paged_mqa_logits", [](const nb::kwargs& values) {
    Arguments call("fp8_paged_mqa_logits", values);
    const Fp8PagedMqaLogitsArgs a = read_paged_mqa(call);
    const std::optional<IsaLevel> isa = call.isa();
    call.run([&](Executor& e) { fp8_paged_mqa_logits(a, &e, isa); });
  });
  m.def("get_paged_mqa_logits_metadata", [](const nb::kwargs& values) {
    Arguments call("get_paged_mqa_logits_metadata", values);
    PagedMqaLogitsMetadataArgs a;
    a.context_lens = call.in("context_lens");
    a.block_size = call.small_integer("block_size", 0);
    a.schedule_metadata = call.out("schedule_metadata");
    call.run_here([&] { get_paged_mqa_logits_metadata(a); });
  });
}

/// (logits, bound), flat.
nb::tuple logits_result(oracle::IndexerLogits r) {
  return nb::make_tuple(numpy_array(std::move(r.logits)), numpy_array(std::move(r.bound)));
}

/// Codes and scales of rows of 128 numbers: (codes as numbers 0 .. 255, scales), flat. `queries`
/// chooses the smallest scale of queries.
nb::tuple oracle_codes(const nb::kwargs& values) {
  Arguments call("oracle.indexer_codes", values);
  const ConstTensorView rows = call.in("rows");
  const bool power_of_two =
      read_scale_format(call, "scale_fmt", IndexerScale::unrounded) == IndexerScale::ue8m0;
  const bool queries = call.boolean("queries", false);
  if (rows.dtype != DType::f32 || rows.rank != 2 || rows.shape[1] != indexer_cache::kDim)
    call.refuse("rows", "float32 [N, 128]", describe(rows));
  std::vector<double> codes, scales;
  call.run_here([&] {
    for (std::int64_t i = 0; i < rows.shape[0]; ++i) {
      std::array<double, indexer_cache::kDim> row{};
      std::array<std::uint8_t, indexer_cache::kDim> row_codes{};
      const float* x = rows.as<float>() + i * rows.strides[0];
      for (std::size_t d = 0; d < row.size(); ++d)
        row[d] = x[static_cast<std::int64_t>(d) * rows.strides[1]];
      scales.push_back(queries ? oracle::indexer_query(row, power_of_two, row_codes)
                               : oracle::indexer_key(row, power_of_two, row_codes));
      codes.insert(codes.end(), row_codes.begin(), row_codes.end());
    }
  });
  return nb::make_tuple(numpy_array(std::move(codes)), numpy_array(std::move(scales)));
}

}  // namespace

void bind_indexer(nb::module_& m) {
  bind_steps(m);
  bind_logits(m);
  m.def("oracle_fp8_mqa_logits", [](const nb::kwargs& values) {
    Arguments call("oracle.fp8_mqa_logits", values);
    const Fp8MqaLogitsArgs a = read_mqa(call);
    return logits_result(call.run_here([&] { return oracle::fp8_mqa_logits(a); }));
  });
  m.def("oracle_fp8_paged_mqa_logits", [](const nb::kwargs& values) {
    Arguments call("oracle.fp8_paged_mqa_logits", values);
    const Fp8PagedMqaLogitsArgs a = read_paged_mqa(call);
    return logits_result(call.run_here([&] { return oracle::fp8_paged_mqa_logits(a); }));
  });
  m.def("oracle_prepare_indexer", [](const nb::kwargs& values) {
    Arguments call("oracle.prepare_indexer", values);
    const PrepareIndexerArgs a = read_prepare(call);
    oracle::PreparedIndexer r = call.run_here([&] { return oracle::prepare_indexer(a); });
    return nb::make_tuple(numpy_array(std::move(r.q)), numpy_array(std::move(r.q_bound)),
                          numpy_array(std::move(r.k)), numpy_array(std::move(r.k_bound)));
  });
  m.def("oracle_indexer_codes", &oracle_codes);
}

}  // namespace attend::python
