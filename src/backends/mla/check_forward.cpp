// SPDX-License-Identifier: Apache-2.0
// All checks of a layer's call: nothing may be written before they pass.
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <utility>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/core/error.h"
#include "backends/mla/layer.h"
#include "core/check.h"

namespace attend::mla {
namespace {

constexpr std::string_view kOp = "FLASH_ATTN_MLA.forward";

check::Where at(std::string_view argument) { return {kOp, argument}; }

void check_rows(std::string_view argument, const ConstTensorView& t, int num_tokens) {
  check::require(
      t.shape[0] >= num_tokens, at(argument),
      [&] { return fmt::format("at least {} rows", num_tokens); }, [&] { return describe(t); });
}

void check_new_rows(const Layer& layer, const ForwardArgs& a, int num_tokens) {
  check::require(!a.key.defined() && !a.value.defined(), at(a.key.defined() ? "key" : "value"),
                 "undefined: MLA layers take kv_c and k_pe", "a tensor");
  check::require(a.kv_c.defined() == a.k_pe.defined(), at(a.kv_c.defined() ? "k_pe" : "kv_c"),
                 "kv_c and k_pe, or neither", "an undefined tensor");
  if (!a.kv_c.defined()) return;
  const DType dtype = layer.config.dtype;
  for (const auto& [name, t, dim] :
       {std::tuple<const char*, ConstTensorView, int>{"kv_c", a.kv_c, layer.dims().kv_lora_rank},
        {"k_pe", a.k_pe, layer.dims().qk_rope_head_dim}}) {
    check::tensor(at(name), t, 2, {dtype});
    check::shape(at(name), t, {-1, dim});
    check::unit_last_stride(at(name), t);
    check_rows(name, t, num_tokens);
  }
}

void check_cache(const Layer& layer, const ForwardArgs& a, const MlaMetadata& m) {
  const check::Where where = at("kv_cache");
  const bool ds_mla = layer.stored.format == KvFormat::fp8_ds_mla;
  check::tensor(where, a.kv_cache, 3, {layer.stored.dtype});
  check::shape(where, a.kv_cache,
               {-1, m.block_size, ds_mla ? fp8_ds_mla::kRowBytes : layer.dims().cache_dim()});
  check::unit_last_stride(where, a.kv_cache);
  check::distinct_elements(where, a.kv_cache);
  check::require(!a.kv_scale_cache.defined(), at("kv_scale_cache"),
                 "undefined: no MLA cache has scales beside it", "a tensor");
  const std::int64_t num_blocks = a.kv_cache.shape[0];
  const std::int64_t capacity = num_blocks * m.block_size;
  for (std::size_t i = 0; i < m.slot_mapping.size(); ++i) {
    check::require(
        m.slot_mapping[i] < capacity, where,
        [&] { return fmt::format("room for slot {} of row {}", m.slot_mapping[i], i); },
        [&] { return describe(a.kv_cache); });
  }
  for (int r = 0; r < m.num_reqs; ++r) {
    const std::int32_t* row = m.block_table.as<std::int32_t>() + r * m.block_table.strides[0];
    const std::int32_t keys = m.seq_lens[static_cast<std::size_t>(r)];
    for (std::int32_t b = 0; b < (keys + m.block_size - 1) / m.block_size; ++b) {
      if (row[b] >= 0 && row[b] < num_blocks) continue;
      check::fail(
          at("block_table"),
          [&] { return fmt::format("block ids in [0, {}) at [{}, {}]", num_blocks, r, b); },
          row[b]);
    }
  }
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
  check::require(
      a.workspace.size >= m.layout.total && a.workspace.data != nullptr, at("workspace"),
      [&] { return fmt::format("at least {} bytes", m.layout.total); },
      [&] {
        return fmt::format("{} bytes{}", a.workspace.size,
                           a.workspace.data == nullptr ? " at null" : "");
      });
}

}  // namespace

void check_results(const Layer& layer, const ForwardArgs& a) {
  const DType dtype = a.output_scale ? DType::fp8_e4m3 : layer.config.dtype;
  check::tensor(at("output"), a.output, 3, {dtype});
  check::shape(at("output"), a.output, {-1, layer.config.num_q_heads, layer.dims().v_head_dim});
  check::unit_last_stride(at("output"), a.output);
  check::distinct_elements(at("output"), a.output);
  if (a.output_scale)
    check::require(std::isfinite(*a.output_scale) && *a.output_scale > 0.0F, at("output_scale"),
                   "a finite value > 0", *a.output_scale);
  if (!a.lse.defined()) return;
  check::tensor(at("lse"), a.lse, 2, {DType::f32});
  check::shape(at("lse"), a.lse, {a.output.shape[0], layer.config.num_q_heads});
  check::distinct_elements(at("lse"), a.lse);
  check::no_overlap(at("lse"), a.lse, "output", a.output);
}

void check_forward(const Layer& layer, const ForwardArgs& a, const MlaMetadata& m,
                   const Executor& executor) {
  check_output_scale(layer, a, m);
  check_rows("output", a.output, m.num_tokens);
  check::tensor(at("query"), a.query, 3, {layer.config.dtype});
  check::shape(at("query"), a.query, {-1, layer.config.num_q_heads, layer.dims().qk_head_dim()});
  check::unit_last_stride(at("query"), a.query);
  check_rows("query", a.query, m.num_tokens);
  check_new_rows(layer, a, m.num_tokens);
  check_cache(layer, a, m);
  check_overlaps(a, m);
  check_resources(a, m, executor);
}

}  // namespace attend::mla
