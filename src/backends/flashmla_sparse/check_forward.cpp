// SPDX-License-Identifier: Apache-2.0
// All checks of a layer's call: nothing may be written before they pass.
#include <fmt/format.h>

#include <array>
#include <string>
#include <utility>

#include "attend/cache/fp8_ds_mla.h"
#include "backends/common/mla_checks.h"
#include "backends/flashmla_sparse/check_group.h"
#include "backends/flashmla_sparse/layer.h"
#include "core/check.h"

namespace attend::flashmla_sparse {
namespace {

constexpr std::string_view kOp = kForwardOp;

check::Where at(std::string_view argument) { return {kOp, argument}; }

MlaCall call_of(const Layer& layer, int num_tokens) {
  return {kOp, layer.dims(), layer.config.num_q_heads, layer.config.dtype, num_tokens};
}

void check_cache(const Layer& layer, const ForwardArgs& a, const SparseMlaMetadata& m) {
  const check::Where where = at("kv_cache");
  const bool ds_mla = layer.stored.format == KvFormat::fp8_ds_mla;
  const int width = ds_mla ? fp8_ds_mla::kRowBytes : layer.dims().cache_dim();
  check::tensor(where, a.kv_cache, 3, {DType::bf16, DType::u8});
  check::require(
      a.kv_cache.dtype == layer.stored.dtype && a.kv_cache.shape[2] == width, where,
      [&] {
        return fmt::format("rows of {} (the formats: fp8_ds_mla, u8 rows of {}; bf16, rows of {})",
                           ds_mla ? "fp8_ds_mla" : "bf16", fp8_ds_mla::kRowBytes,
                           layer.dims().cache_dim());
      },
      [&] { return describe(a.kv_cache); });
  check::shape(where, a.kv_cache, {-1, m.block_size, width});
  check::unit_last_stride(where, a.kv_cache);
  check::distinct_elements(where, a.kv_cache);
  check_mla_cache_room(kOp, a.kv_cache, m.slot_mapping);
}

void check_indices(const ForwardArgs& a, const SparseMlaMetadata& m) {
  const check::Where where = at("topk_indices");
  check::tensor(where, a.topk_indices, 2, {DType::i32});
  check::shape(where, a.topk_indices, {-1, m.topk});
  check::unit_last_stride(where, a.topk_indices);
  check_mla_rows(kOp, "topk_indices", a.topk_indices, m.num_tokens);
}

void check_overlaps(const ForwardArgs& a, const SparseMlaMetadata& m) {
  const std::array<std::pair<const char*, ConstTensorView>, 6> read = {
      {{"query", a.query},
       {"kv_c", a.kv_c},
       {"k_pe", a.k_pe},
       {"topk_indices", a.topk_indices},
       {"block_table", m.block_table},
       {"kv_cache", a.kv_cache}}};
  for (const auto& [name, t] :
       {std::pair<const char*, ConstTensorView>{"output", a.output}, {"lse", a.lse}}) {
    if (!t.defined()) continue;
    for (const auto& [other, input] : read)
      if (input.defined()) check::no_overlap(at(name), t, other, input);
  }
  for (const auto& [other, input] : read)
    if (input.defined() && std::string_view(other) != "kv_cache")
      check::no_overlap(at("kv_cache"), a.kv_cache, other, input);
}

}  // namespace

void check_results(const Layer& layer, const ForwardArgs& a) {
  check_mla_results(call_of(layer, 0), a);
}

void check_forward(const Layer& layer, const ForwardArgs& a, const SparseMlaMetadata& m,
                   const Executor& executor) {
  if (a.output_scale)
    check::require(m.quant_output, at("output_scale"),
                   "unset: the builder was not asked for quant_output", *a.output_scale);
  check_mla_rows(kOp, "output", a.output, m.num_tokens);
  check_mla_inputs(call_of(layer, m.num_tokens), a);
  check_indices(a, m);
  check_cache(layer, a, m);
  check_mla_blocks(
      kOp, {m.block_table, m.seq_lens, m.block_size * m.dcp.world_size, a.kv_cache.shape[0]});
  check_overlaps(a, m);
  check_group(kOp, a.communicator, m.dcp);
  check::require(
      executor.num_workers() == m.num_workers, at("executor"),
      [&] { return fmt::format("{} workers, as the builder was told", m.num_workers); },
      executor.num_workers());
  check_mla_workspace(kOp, a.workspace, m.layout.total);
}

}  // namespace attend::flashmla_sparse
