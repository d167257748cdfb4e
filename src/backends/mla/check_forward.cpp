// SPDX-License-Identifier: Apache-2.0
// All checks of a layer's call: nothing may be written before they pass.
#include <fmt/format.h>

#include <array>
#include <utility>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/core/error.h"
#include "backends/common/mla_checks.h"
#include "backends/mla/layer.h"
#include "core/check.h"

namespace attend::mla {
namespace {

constexpr std::string_view kOp = "FLASH_ATTN_MLA.forward";

check::Where at(std::string_view argument) { return {kOp, argument}; }

MlaCall call_of(const Layer& layer, int num_tokens) {
  return {kOp, layer.dims(), layer.config.num_q_heads, layer.config.dtype, num_tokens};
}

void check_cache(const Layer& layer, const ForwardArgs& a, const MlaMetadata& m) {
  const check::Where where = at("kv_cache");
  const bool ds_mla = layer.stored.format == KvFormat::fp8_ds_mla;
  check::tensor(where, a.kv_cache, 3, {layer.stored.dtype});
  check::shape(where, a.kv_cache,
               {-1, m.block_size, ds_mla ? fp8_ds_mla::kRowBytes : layer.dims().cache_dim()});
  check::unit_last_stride(where, a.kv_cache);
  check::distinct_elements(where, a.kv_cache);
  check_mla_cache_room(kOp, a.kv_cache, m.slot_mapping);
  check_mla_blocks(kOp, {m.block_table, m.seq_lens, m.block_size, a.kv_cache.shape[0]});
}

void check_overlaps(const ForwardArgs& a, const MlaMetadata& m) {
  const std::array<std::pair<const char*, ConstTensorView>, 5> read = {
      {{"query", a.query},
       {"kv_c", a.kv_c},
       {"k_pe", a.k_pe},
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

void check_output_scale(const Layer& layer, const ForwardArgs& a, const MlaMetadata& m) {
  if (!a.output_scale) return;
  if (auto reason = layer.prefill_backend->quant_output_reason(layer.config.mla->platform))
    throw Unsupported(std::string(kOp), {*std::move(reason)});
  check::require(m.quant_output, at("output_scale"),
                 "unset: the builder was not asked for quant_output", *a.output_scale);
}

void check_resources(const ForwardArgs& a, const MlaMetadata& m, const Executor& executor) {
  const auto check_workers = [&](const AttentionPlan& plan) {
    check::require(
        executor.num_workers() == plan.num_workers, at("executor"),
        [&] { return fmt::format("{} workers, as the builder was told", plan.num_workers); },
        executor.num_workers());
  };
  if (m.split.num_decodes > 0) check_workers(m.decode);
  if (!m.prefill_steps.empty()) check_workers(m.prefill_steps.front().plan);
  check_mla_workspace(kOp, a.workspace, m.layout.total);
}

}  // namespace

void check_results(const Layer& layer, const ForwardArgs& a) {
  check_mla_results(call_of(layer, 0), a);
}

void check_forward(const Layer& layer, const ForwardArgs& a, const MlaMetadata& m,
                   const Executor& executor) {
  check_output_scale(layer, a, m);
  check_mla_rows(kOp, "output", a.output, m.num_tokens);
  check_mla_inputs(call_of(layer, m.num_tokens), a);
  check_cache(layer, a, m);
  check_overlaps(a, m);
  check_resources(a, m, executor);
}

}  // namespace attend::mla
